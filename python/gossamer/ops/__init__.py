"""The ops: of each its schema, native implementation, fake, gradient and public function."""

from .sparse24 import sparse24_linear

__all__ = ["sparse24_linear"]
