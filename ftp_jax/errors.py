"""The one exception for mistakes a user can make: one sentence, with the fix."""


class UserError(Exception):
  """Something the user can correct; command-line entries print it without a traceback."""
