"""The gate: a variant is measured only where its loss and gradients agree with the float64 definition."""

from dataclasses import dataclass

from torch import Tensor

from benchmarks.registry import Inputs, Op, Result, Variant


@dataclass(frozen=True)
class Agreement:
    """Errors against the float64 definition, and whether they are within the op's tolerances.

    Attributes:
        loss: |loss - definition|, the largest where it is several numbers.
        gradient: the largest |gradient - definition| / |definition| (Frobenius norms) over the gradients.
        passed: False as well where an error is NaN.
    """

    loss: float
    gradient: float
    passed: bool


class Checker:
    """Checks variants on one set of inputs of an op; the definition is computed once for variants that share it."""

    def __init__(self, op: Op, inputs: Inputs) -> None:
        self._op = op
        self._inputs = inputs
        self._definitions: dict[tuple[object, object], tuple[Inputs, Result]] = {}

    def check(self, variant: Variant) -> Agreement:
        inputs = self._op.probe(variant.prepare(self._inputs))
        key = (variant.prepare, variant.expected)
        if key not in self._definitions:
            exact = {name: _doubled(tensor) for name, tensor in variant.expected(inputs).items()}
            self._definitions[key] = exact, self._op.step(self._op.oracle, exact)
        return _compare(self._op, self._op.run(variant, inputs), *self._definitions[key])


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _compare(op: Op, got: Result, inputs: Inputs, exact: Result) -> Agreement:
    loss = float((op.judged(inputs, got.loss).double() - op.judged(inputs, exact.loss)).abs().max())
    errors = [
        float((got.gradients[name].double() - gradient).norm() / gradient.norm())
        for name, gradient in exact.gradients.items()
    ]
    # max() would drop a NaN that is not the first
    gradient = next((error for error in errors if error != error), max(errors, default=0.0))
    return Agreement(loss, gradient, loss <= op.loss_tolerance and gradient <= op.gradient_tolerance)
