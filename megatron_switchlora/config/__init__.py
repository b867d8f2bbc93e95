"""The configuration of a run: sections, options and their facts, command line, YAML, and DeepSpeed's JSON."""
