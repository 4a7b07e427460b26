"""What can go wrong, as one small tree.

    ValueError
    └── MoECLIPError                  base: one line that names the thing and the remedy
        ├── UnreadableImageError      an image file or array cannot be read as an image
        ├── CheckpointError           a model folder, adapter or processor cannot be used
        │   └── ConversionError       a checkpoint of another format does not fit
        ├── DatasetError              a data set's tree, index or masks are not as they should be
        └── PublishingError           the Hub does not take what is pushed

    UserWarning
    └── MoECLIPWarning                something of the input is passed over, and the work goes on

The `moeclip` command turns any error of the tree, and any `OSError` such as a full disk, into one line on standard
error and exit status 1; a command that is used wrongly ends with status 2, before any work. A warning is a line on
standard error as well, and changes no status. Whatever else is raised is a fault of this package, and shows its
traceback.

The code that travels with a checkpoint (`moeclip_hf.modeling`) knows nothing of this package and raises plain
`ValueError`s, which the package names in its own where they come from a user's file or setting.
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
