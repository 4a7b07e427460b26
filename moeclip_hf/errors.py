"""What can go wrong, as one small tree.

    MoECLIPError                  base: one line that names the thing and the remedy
    ├── UnreadableImageError      an image file or array cannot be read as an image
    ├── CheckpointError           a model folder, adapter or processor cannot be used
    │   └── ConversionError       a checkpoint of another format does not fit
    ├── DatasetError              a data set's tree, index or masks are not as they should be
    └── PublishingError           the Hub does not take what is pushed

The `moeclip` command turns any of them into one line on standard error and exit status 1. All are `ValueError`s, so
that code which knows nothing of this package can catch them. What is said and stops nothing is a `MoECLIPWarning`, for
which the command prints a line as well.
"""


class MoECLIPError(ValueError):
    """Base of all errors raised on purpose by moeclip-hf."""


class UnreadableImageError(MoECLIPError):
    """An image file or array cannot be read as an image."""


class CheckpointError(MoECLIPError):
    """A model folder, adapter or processor cannot be used."""


class ConversionError(CheckpointError):
    """A checkpoint of another format does not fit: unknown, unused, missing or misshapen entries."""


class DatasetError(MoECLIPError):
    """A data set's tree, index or masks are not as they should be."""


class PublishingError(MoECLIPError):
    """The Hub does not take what is pushed: no login, no rights, no connection."""


class MoECLIPWarning(UserWarning):
    """Something of the input is passed over, or not as it should be, and the work goes on."""
