"""Parts of the documentation that are generated: tables from benchmarks/*.json, the figure of a training step."""
