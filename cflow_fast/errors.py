"""Errors that a user can mend. Each message is one line that names the thing at fault and what to do."""

from __future__ import annotations


class CFlowFastError(ValueError):
    """Base of this package's own errors: the command line prints it as one line and exits with 1."""


class DataError(CFlowFastError):
    """An image, a mask or a data folder cannot be used; the message names the path."""


class ModelFileError(CFlowFastError):
    """A model file cannot be read: cut short, of another version, or not a model at all."""


class EncoderError(CFlowFastError):
    """An encoder, one of its layers or its weights cannot be had."""


class UnsupportedBlockError(CFlowFastError):
    """A foreign coupling block computes something that a FlowDecoder cannot represent; the message names the block."""
