"""Benchmarks: lm-eval's model interface over an engine, local task files, retrieval, and `ftp-jax eval`.

    adapter     `EngineLM`, lm-eval's model class, registered there as `ftp_jax`
    generation  options of generation as tasks write them
    files       JSON Lines and texts -> checked items; their formats
    tasks       items -> lm-eval tasks with the prompts of its own tasks
    retrieval   a number stated early in a long context, asked for at its end
    results     lm-eval's samples -> records of items, figures, tables
    suite       names of tasks -> jobs; runs them and keeps one results file
    command     `ftp-jax eval`: flags, settings of the model

Everything but `files` and `retrieval` needs lm-eval: pip install '.[eval]' in the checkout.
"""
