"""
What an epoch costs: ART's trainers and this package's, measured side by side in one run.

    python evaluation/speed --batch-size 64              # every model, on the CPU: an hour on two cores
    python evaluation/speed --batch-size 64 --savings    # what each way of saving time brings
    python evaluation/speed --device cuda --precision tf32 --batches 8
    python evaluation/speed --preset smoke               # a minute; shows that it runs, not how fast

Contenders take turns within every repeat, in random order, so that a machine that is busy for a while is busy for all.
A figure is the median over the repeats, a ratio is one of medians of the same run. The data are random: nothing depends
on accuracy. Results are kept as JSON, model by model: the same command skips what is done, and ``--tables-only`` writes
the Markdown again from what there is.
"""
