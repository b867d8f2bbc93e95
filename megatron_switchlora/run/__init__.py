"""Write a run's folder, records, plots and terminal output."""
