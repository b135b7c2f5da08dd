"""`ftp-jax bench`: what routing costs and gains on this machine, measured beside our own dense path.

One module a question (prefill, decode, overhead, compiling, crossover); `timing` has the clock, `cases` what
is run, `records` what is written. Light to import: the process that runs torch starts here.
"""
