"""What the user asked for cannot be done."""


class UsageError(ValueError):
    """The text is one sentence naming the field, its value and what is accepted."""
