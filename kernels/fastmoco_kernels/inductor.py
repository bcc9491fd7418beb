"""What torch.compile needs to know before it meets a deep network of custom operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def name_operands_by_type() -> None:
    """Let Inductor's messages name operands by their types instead of writing them out.

    Of torch 2.11, Inductor writes out the operands of each custom operation when it first meets it,
    for a line of a log that nobody reads. Their text holds that of all that they were made of, and
    doubles with every residual block: a ResNet-50 with our batch norm did not compile in 300 s on
    an H200. Newer torch writes that line only where it is read. Call it before compiling; what is
    compiled stays the same. Reported in vllm-project/vllm#42129.
    """
    from torch._inductor.exc import OperatorIssue  # slow to import, and only compilers need it

    OperatorIssue.operator_str = staticmethod(_operator_str)  # type: ignore[method-assign]


def _operator_str(target: object, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """An operation and the types of its operands, in a line of each."""
    operands = [(f"args[{number}]", one) for number, one in enumerate(args)]
    operands += [(f"kwargs[{name!r}]", one) for name, one in kwargs.items()]
    lines = [f"{name}: {type(one).__name__}" for name, one in operands]
    return "\n".join([f"  target: {target}", *(f"  {line}" for line in lines)])
