"""What one process must not do twice at once."""

import threading

# While transformers builds a model it replaces functions of its classes for the whole process, and puts back what it
# found: two threads that load at once leave weights unset, tied ones among them, for good.
MODEL_LOADING = threading.RLock()
