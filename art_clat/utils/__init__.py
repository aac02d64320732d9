"""What every room needs: modes and random generators, processes, files, plots, checks."""
