"""One HTML page about evaluations and trainings."""
