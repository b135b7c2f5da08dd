"""Does a run fit a pod, and what would it cost: programs compiled ahead of time for TPUs that need not be there.

  topologies   the chips and their public figures; devices of a topology, described by libtpu
  programs     train, search, prefill and decode as they run, over shapes instead of arrays
  counts       FLOPs from the traced program, loops and kernels included; products shaped like a weight
  hlo          what the compiled program of one chip moves and holds
  cost         time of a step and of a whole run, by formula
  command      `ftp-jax compile-check`
"""
