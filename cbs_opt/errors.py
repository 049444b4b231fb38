"""Exceptions about networks, data and mask files; the base classes live in `formulations.errors`."""

from __future__ import annotations

from formulations.errors import ArgumentError, InstanceFormatError, NonFiniteError


class NoEligibleWeightsError(ArgumentError):
    """The network has no weight that may be pruned under the given choice."""


class BlockListError(ArgumentError):
    """The network has no list of blocks of one class that follow one another, or they share a weight."""


class UnmatchedPatternError(ArgumentError):
    """A glob matches no parameter of the network."""


class PartitionMismatchError(ArgumentError):
    """A partition or flat vector belongs to another network."""


class TrainingModeError(ArgumentError):
    """Dropout or batch normalisation is in training mode, so one sample has no gradient of its own."""


class RandomOutputError(TrainingModeError):
    """The network gives the same samples another output when it is run again."""


class ForwardError(ArgumentError):
    """The network raised when it was run; the original exception is the cause."""


class LossError(ArgumentError):
    """The loss raised, is no scalar, or does not depend on the weights; what it raised is the cause."""


class PerSampleGradientError(ArgumentError):
    """The network or the loss cannot be differentiated; the original exception is the cause."""


class NonFiniteGradientError(NonFiniteError):
    """A gradient row holds NaN or infinity."""


class EmptyDataError(ArgumentError):
    """The data holds no sample."""


class DataLoaderError(ArgumentError):
    """The caller's data raised while it was read; the original exception is the cause."""


class BatchFormatError(ArgumentError):
    """A batch has a form that is not known, or tensors of different numbers of samples."""


class LabelRangeError(ArgumentError):
    """A class label lies outside the network's outputs."""


class MaskFileError(InstanceFormatError):
    """A file is not a mask file of ours, or is damaged."""


class MaskMismatchError(ArgumentError):
    """Kept masks do not fit the network: other names or other shapes."""


class NoBatchNormError(ArgumentError):
    """The network has no batch normalisation with running statistics."""


class ExecutorError(ArgumentError):
    """An executor cannot take blocks."""


class RunMismatchError(ArgumentError):
    """A directory holds another run; the message names every difference."""


class RunInUseError(ArgumentError):
    """A directory holds a run that another process is doing."""


class NetworkChangedError(ArgumentError):
    """The network was changed by something else while it was being pruned."""


class RowStoreError(ArgumentError):
    """Gradient rows cannot be kept on disk: no folder, no permission, no space."""


class RowMemoryError(ArgumentError):
    """Gradient rows do not fit into the memory that was allowed for them, in any way the run could use."""


class RecipeFileError(ArgumentError):
    """A recipe file is no TOML, of another version, or has a field that does not exist."""


class StructureError(ArgumentError):
    """A network cannot be made smaller as asked: what was to go is stated somewhere in its code."""
