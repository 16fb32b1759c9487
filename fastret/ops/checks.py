"""What every op checks of its arguments before anything reads them. Messages name the argument, what was given, what
is expected. Only shapes, dtypes, devices and Python numbers are looked at here: these checks trace and never wait for
a device; values of CPU tensors are checked inside the operators."""

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CODES = (torch.uint16, *INTEGERS)

MOST_WORDS = 1 << 16  # of a book: a code has at most 16 bits


def check_rows(x: Tensor, name: str, *, like: Tensor | None = None, called: str = "the queries") -> None:
    """A (rows, width) floating point matrix, of the width and device of ``like``, which messages call ``called``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape (rows, width), got {type(x).__name__}")
    if x.dim() != 2:
        raise ValueError(f"{name}: expected shape (rows, width), got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.shape[1] == 0:
        raise ValueError(f"{name}: expected at least one column, got {tuple(x.shape)}")
    if like is not None and x.shape[1] != like.shape[1]:
        raise ValueError(f"{name}: expected {like.shape[1]} columns like {called}, got {x.shape[1]}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} like {called}, got {x.device}")


def check_labels(labels: Tensor, rows: Tensor, name: str) -> None:
    """One integer per row, on the device of the rows."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: expected an integer tensor of shape ({rows.shape[0]},), got {type(labels).__name__}")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer dtype, got {labels.dtype}")
    if labels.dim() != 1 or labels.shape[0] != rows.shape[0]:
        raise ValueError(f"{name}: expected shape ({rows.shape[0]},), one label per row, got {tuple(labels.shape)}")
    if labels.device != rows.device:
        raise ValueError(f"{name}: expected device {rows.device} like the rows, got {labels.device}")


def check_labelled(embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None) -> None:
    """The arguments of a loss over labelled rows, alone or against a gallery."""
    check_rows(embeddings, "embeddings")
    check_labels(labels, embeddings, "labels")
    if (ref_emb is None) != (ref_labels is None):
        raise ValueError("ref_emb, ref_labels: expected both or neither")
    if ref_emb is not None and ref_labels is not None:
        check_rows(ref_emb, "ref_emb", like=embeddings)
        check_labels(ref_labels, ref_emb, "ref_labels")


def check_codebook(codebook: Tensor) -> None:
    """A floating point tensor (books, words, width) that holds something, of at most 65,536 words."""
    if not isinstance(codebook, Tensor):
        raise TypeError(f"codebook: expected a tensor of shape (books, words, width), got {type(codebook).__name__}")
    if codebook.dtype not in FLOATS:
        raise TypeError(f"codebook: expected float32, float64, bfloat16 or float16, got {codebook.dtype}")
    if codebook.dim() != 3 or 0 in codebook.shape:
        raise ValueError(f"codebook: expected shape (books, words, width), none of them 0, got {tuple(codebook.shape)}")
    if codebook.shape[1] > MOST_WORDS:
        raise ValueError(f"codebook: expected at most {MOST_WORDS:,} words a book, got {codebook.shape[1]:,}")


def check_codes(codes: Tensor, codebook: Tensor) -> None:
    """(N, M) integers, on the device of the codebook; their values are not looked at."""
    books = codebook.shape[0]
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes: expected an integer tensor (N, {books}), got {type(codes).__name__}")
    if codes.dtype not in CODES:
        raise TypeError(f"codes: expected an integer dtype, got {codes.dtype}")
    if codes.dim() != 2 or codes.shape[1] != books:
        raise ValueError(f"codes: expected shape (N, {books}), a code a book, got {tuple(codes.shape)}")
    if codes.device != codebook.device:
        raise ValueError(f"codes: expected device {codebook.device} like the codebook, got {codes.device}")


def check_positive(value: float | Tensor, name: str) -> None:
    """A number > 0, or a 0-dim floating point tensor whose value is checked where it is on the CPU."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected a number or a 0-dim floating point tensor, got {value.dtype} {tuple(value.shape)}"
            )
        readable = value.device.type == "cpu" and not torch.compiler.is_compiling() and not is_wrapped(value)
        if readable and not 0 < value.item() < math.inf:
            raise ValueError(f"{name}: expected a positive finite number, got {value.item()}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")


def check_number(value: float, name: str) -> None:
    """A finite Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # torch.compile traces no isfinite of a number that varies
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_integer(value: int, name: str, least: int | None = None) -> None:
    """An integer, of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_count(value: int | None, name: str) -> None:
    """None or an integer >= 1."""
    if value is not None:
        check_integer(value, name, 1)


def check_centers(rows: Tensor | None, centers: int, name: str) -> None:
    """An integer >= 1 that divides the number of rows."""
    if isinstance(centers, bool) or not isinstance(centers, (int, torch.SymInt)):
        raise TypeError(f"centers: expected an integer, got {type(centers).__name__}")
    if centers < 1:
        raise ValueError(f"centers: expected at least 1, got {centers}")
    if rows is not None and rows.shape[0] % centers:
        raise ValueError(f"{name}: expected {centers} centers a class, got {rows.shape[0]} rows")


def check_vector(values: Tensor, rows: Tensor, name: str) -> None:
    """One real number per row, on the device of the rows."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape ({rows.shape[0]},), got {type(values).__name__}")
    if values.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating point dtype, got {values.dtype}")
    if values.dim() != 1 or values.shape[0] != rows.shape[0]:
        raise ValueError(f"{name}: expected shape ({rows.shape[0]},), got {tuple(values.shape)}")
    if values.device != rows.device:
        raise ValueError(f"{name}: expected device {rows.device} like the rows, got {values.device}")


def wants_gradient(t: Tensor | None) -> bool:
    """Whether a backward could ask for the gradient of t."""
    if t is None or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        t = t.view_as(t)  # of t itself Dynamo knows what it required before torch.func.grad (``library.apply``)
        return t.requires_grad
    return t.requires_grad or is_wrapped(t)


def check_range(index: Tensor, size: int, name: str, *, negative: bool = False) -> None:
    """Every value in [0, size), or negative where those mean something; a device other than the CPU is not waited for
    but asserts."""
    if torch.compiler.is_compiling() or is_wrapped(index):
        return
    # a size that the dtype of the index does not hold would wrap, and no index reaches it
    most = min(size - 1, torch.iinfo(index.dtype).max)
    right = (index < 0) & negative if most < 0 else index.clamp(None if negative else 0, most) == index
    message = f"{name}: expected numbers from 0 to {size - 1}"
    if index.device.type != "cpu":
        torch._assert_async(right.all(), message)
    elif not right.all():
        raise ValueError(f"{message}, got {int(index[~right][0])}")


def check_offsets(offsets: Tensor, entries: int, name: str) -> None:
    """Numbers that never fall, from 0 to the number of entries; a device other than the CPU is not waited for."""
    if torch.compiler.is_compiling() or is_wrapped(offsets):
        return
    right = (offsets.diff() >= 0).all() & (offsets[0] == 0) & (offsets[-1] == entries)
    message = f"{name}: expected numbers that rise from 0 to {entries}"
    if offsets.device.type != "cpu":
        torch._assert_async(right, message)
    elif not right:
        raise ValueError(f"{message}, got {offsets.tolist()}")


def is_wrapped(t: Tensor) -> bool:
    """Under torch.func a tensor's value cannot be read, nor whether its gradient is wanted."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(t))
