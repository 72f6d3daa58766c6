from ..reference_backend import *  # noqa
