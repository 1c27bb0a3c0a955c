"""Errors a caller may want to catch."""


class UnsupportedModelError(ValueError):
    """The model cannot be converted without decoding wrongly; the message names the module or node and the reason."""


class SelfCheckError(RuntimeError):
    """The converted pair does not reproduce the original model's logits."""


class SavedModelError(ValueError):
    """A folder cannot be saved to, or what it holds cannot be loaded; the message names the file and what to do."""


class CacheFullError(ValueError):
    """More tokens were asked for than ``max_cache_len`` allows."""


class QueueFullError(RuntimeError):
    """An engine has as many waiting requests as it takes; later there is room again."""
