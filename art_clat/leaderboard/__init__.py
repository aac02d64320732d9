"""RobustBench: entries, its own benchmark, model definitions."""
