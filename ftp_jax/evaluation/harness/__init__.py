"""Benchmarks: lm-eval's model interface over an engine, local task files, retrieval, and `ftp-jax eval`.

    adapter     `EngineLM`, lm-eval's model class, registered there as `ftp_jax`
    files       JSON Lines and texts -> checked items; their formats
    tasks       items -> lm-eval tasks with the prompts of its own tasks
    retrieval   a number stated early in a long context, asked for at its end
    results     lm-eval's samples -> records of items, figures, tables
    command     `ftp-jax eval`: settings, resumption, files

Everything but `files` and `retrieval` needs lm-eval: pip install 'ftp-jax[eval]'.
"""
