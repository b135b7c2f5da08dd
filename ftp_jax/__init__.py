"""ftp_jax: fine-grained token-wise pruning (FTP, arXiv 2412.11494) of frozen LLMs in JAX.

Legend of the axis letters used in array names (`x_BxTxD`, `keep_BxT`, ...):

    B  sequences in a batch          T  token positions of a sequence
    L  transformer blocks            D  hidden size
    H  query heads                   G  key/value heads (G divides H)
    S  keys that queries see         W  late queries whose attention routers read
    K  capacity: token slots a block computes
    M  slots of tokens after the prefill
    N  dimension of one head         F  hidden size of the MLP; factors that a router reads
    R  a router's hidden state; rows of a prefix that are scored
    V  vocabulary                    P  candidates of a population; score positions
    C  continuation positions that are scored
    U  blocks with router inputs of their own

The host's sets of prompts have N rows. A package whose docstring says so gives letters another meaning.

Rows are padded on the right: row b is valid at t < length_B[b] and its context is
t < context_B[b] (see docs/method.md for the semantics of context and continuation).
"""

__version__ = "0.1.0"
