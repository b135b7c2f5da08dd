"""Training prompts that say a passage twice, so that routers learn what of a text is needed when it is needed again.

A context is a passage of a document, an empty line and the beginning of the passage once more; the continuation is how
it goes on. Nothing but the passage tells, so that skipping a token that carries a number, a name or a rare word costs
what it costs when a prompt asks for it, which short answers to short questions seldom show.
"""

import numpy as np

from ftp_jax.data.encoding import bos_ids, encode_windows
from ftp_jax.data.prompts import Prompts, pack, shuffled
from ftp_jax.data.records import read_documents
from ftp_jax.errors import UserError

_BETWEEN = "\n\n"
_STREAM = 11  # of random numbers, and the next one, apart from those that draw the sets


def repeated_passages(data, tokenizer) -> Prompts:
  """Prompts (num_repeats, max_context + continuation) of `config.data`, each of another passage of data.repeats_path.

  A passage has 2/5 to 2/3 of max_context tokens; it is said again up to a point between min_context and max_context
  that leaves at least min_continuation tokens of it. All of it depends on data.seed alone.

  Raises:
    UserError: the file cannot be read or has too few passages, or the lengths leave no room for one.
  """
  start, between = bos_ids(tokenizer), tokenizer(_BETWEEN, add_special_tokens=False).input_ids
  room = {}  # tokens of a passage -> the least and the most of it that a context can say again
  for passage in range(2 * data.max_context // 5, 2 * data.max_context // 3 + 1):
    before = len(start) + passage + len(between)
    least, most = max(1, data.min_context - before), min(passage - data.min_continuation, data.max_context - before)
    if least <= most:
      room[passage] = least, most
  if not room:
    raise UserError(
        f"data.min_context={data.min_context}, data.max_context={data.max_context} and data.min_continuation="
        f"{data.min_continuation} leave no room to say a passage twice; widen them, or set data.num_repeats=0."
    )
  lengths = sorted(room)
  documents = read_documents(data.repeats_path)
  windows = encode_windows(documents, tokenizer, len(start) + lengths[-1])
  begin = len(start) + lengths[0]  # no two passages begin alike, however long each will be
  passages = list({tuple(ids[:begin]): ids for rows in windows for ids in rows}.values())
  if len(passages) < data.num_repeats:
    raise UserError(
        f"data.repeats_path={data.repeats_path} has {len(passages)} passages of {lengths[-1]} tokens, not "
        f"data.num_repeats={data.num_repeats}; lower it or give a longer text."
    )
  # Of these generators numpy keeps the raw bits fixed across its versions.
  drawn = np.random.PCG64(np.random.SeedSequence((data.seed, _STREAM + 1))).random_raw(2 * data.num_repeats).tolist()
  rows = []
  for i, at in enumerate(shuffled(len(passages), data.seed, _STREAM)[: data.num_repeats]):
    count = lengths[drawn[2 * i] % len(lengths)]
    least, most = room[count]
    again = least + drawn[2 * i + 1] % (most - least + 1)
    passage = passages[at][len(start) : len(start) + count]
    context = start + passage + between + passage[:again]
    rows.append((context + passage[again : again + data.continuation], len(context)))
  return pack(rows, data.max_context + data.continuation)
