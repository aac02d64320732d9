"""
The evidence: arms × seeds from ``paper_tables.toml``, the recorded runs, and the tables and plots made from them.

    python evaluation/paper_tables run --preset cpu --data data --tables A B C
    python evaluation/paper_tables stability --preset cpu --data data
    python evaluation/paper_tables aggregate --preset cpu

``run`` skips what is done, continues what was killed, and may be started several times at once: one process takes each
job. All arms of a seed start from the same first-stage checkpoint and train for as many epochs, with the same data
order, schedule and attack. λ and the learning rate are tuned on validation images, with seeds of their own. The test
images are used once, at the end of a run. A job that crashes is recorded as failed, and ``aggregate`` reports it.
``stability`` measures the criticality of the first stages' layers several times, for table E.

A finished job is one JSON file in the work folder. ``collect`` adds the finished jobs to the committed files in
``evaluation/results/paper_tables/``; the jobs' files stay, and count before the committed ones. ``aggregate`` collects,
then writes ``results.md`` and the plots from the committed files alone.
"""
