"""What every room needs: putting a model back as it was, processes, files, plots."""
