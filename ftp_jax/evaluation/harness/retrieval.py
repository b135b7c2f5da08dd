"""A number stated early in a long context and asked for at its end: shows what skipping early tokens costs.

Filler sentences surround four statements "The number of the red lamp is 4821." of different things; the question asks
for one of them, whose statement stands at the wanted depth. The answers to choose from are the four numbers, so that
chance is 1/4 and none of them is new to the reader. Filler is put together from the phrases below: the same items
with every Python, and nothing in them tells the answer.
"""

import random
from collections.abc import Callable, Sequence

from ftp_jax.errors import UserError
from ftp_jax.evaluation.harness.files import Item

LENGTHS, DEPTHS, COUNT = (256, 512, 1024), (0.1, 0.5, 0.9), 20
_CHOICES = 4
_COLOURS = ("red", "green", "blue", "yellow", "black", "white", "brown", "silver")
_THINGS = ("lamp", "boat", "door", "kettle", "wagon", "chair", "tower", "basket", "ladder", "clock", "bridge", "barn")
_WHEN = (
    "In the morning", "After lunch", "Late in the autumn", "On quiet days", "Before the rain", "When the market closed",
    "At the end of the week", "During the long winter", "As the sun went down", "Once the snow had melted",
)
_WHO = (
    "the baker", "an old fisherman", "the teacher", "a young carpenter", "the miller's daughter", "the postman",
    "a travelling musician", "the gardener", "one of the neighbours", "the ferryman",
)
_WHAT = (
    "walked slowly to the harbour", "talked about the weather", "mended a fence near the orchard",
    "looked for mushrooms in the forest", "carried water up the hill", "told a story to the children",
    "waited for a letter from the city", "listened to the wind in the trees", "swept the leaves from the path",
    "bought apples and fresh bread",
)
_AND = (
    "and nobody was in a hurry", "while the dogs slept by the gate", "and the street was almost empty",
    "because the work was done", "and later there was soup for everyone", "although the roads were muddy",
    "and the bells rang from the church", "while the river ran high", "and friends came by in the evening",
    "but the shop stayed open",
)


def documents(
    encode: Callable[[str], Sequence[int]], lengths: Sequence[int] = LENGTHS, depths: Sequence[float] = DEPTHS,
    count: int = COUNT, seed: int = 0,
) -> list[Item]:
  """Documents of the task, `count` for each length and depth.

  Args:
    encode: gives the token ids of a text.
    lengths: most tokens of a context, question included; it falls short by less than one sentence.
    depths: where the statement begins, as a share of the filler, each in [0, 1].

  Raises:
    UserError: a length is too short for statements and question, a depth out of range, or there are no items.
  """
  if not all(0 <= depth <= 1 for depth in depths):
    raise UserError(f"retrieval depths {', '.join(map(str, depths))} must lie in 0..1.")
  if count < 1:
    raise UserError(f"{count} retrieval items are none; ask for at least 1.")
  return [_document(encode, length, depth, n, seed) for length in lengths for depth in depths for n in range(count)]


def _document(encode, length: int, depth: float, n: int, seed: int) -> Item:
  """One document. No other has its things and numbers: what a model likes to answer would count in all of them."""
  draw = random.Random(f"{seed}/{length}/{depth}/{n}")
  pick = lambda options: options[int(draw.random() * len(options))]  # only random() is fixed across Pythons
  names, keys = [], []
  while len(names) < _CHOICES:
    name, key = f"{pick(_COLOURS)} {pick(_THINGS)}", str(1000 + int(draw.random() * 9000))
    if name not in names and key not in keys:
      names.append(name)
      keys.append(key)
  places = [depth] + [draw.random() for _ in names[1:]]
  label = int(draw.random() * _CHOICES)
  choices = keys[1:]
  choices.insert(label, keys[0])  # the asked thing is the first
  statements = [f" The number of the {name} is {key}." for name, key in zip(names, keys)]
  question = f"\n\nQuestion: What is the number of the {names[0]}?\nAnswer: The number of the {names[0]} is"
  size = lambda text: len(encode(text))
  opening = "Here is a story."
  room = length - size(opening + "".join(statements) + question)
  if room < 0:
    raise UserError(f"Retrieval contexts of {length} tokens have no room for the statements; ask for longer --lengths.")
  filler, sizes = [], []
  while True:
    sentence = f" {pick(_WHEN)} {pick(_WHO)} {pick(_WHAT)}, {pick(_AND)}."
    cost = size(opening + sentence) - size(opening)  # without what a tokenizer puts before a text
    if sum(sizes) + cost > room:
      break
    filler.append(sentence)
    sizes.append(cost)
  total = sum(sizes)
  inserted = sorted(
      (next((i for i in range(len(sizes)) if sum(sizes[:i]) >= place * total), len(sizes)), s)
      for s, place in enumerate(places)
  )
  for at, statement in reversed(inserted):
    filler.insert(at, statements[statement])
  return {
      "id": f"{length}-{depth}-{n}", "text": "Here is a story." + "".join(filler) + question,
      "choices": choices, "label": label, "group": f"{length} tokens, depth {depth}",
  }
