"""Names that settings and command lines accept, without the libraries that implement them."""

from typing import Literal, get_args

TextStorage = Literal["nf4", "int8"]  # of the text encoder's layers
TEXT_STORAGES: tuple[TextStorage, ...] = get_args(TextStorage)
PRECISIONS = ("auto", "fp32", "bf16", "fp8", "int8", "nf4")
