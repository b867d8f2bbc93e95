"""From the shell to the first collective: launchers, environment, preflight, device, signals and the watch."""
