"""Instance softmax: every image its own class, a memory bank as the classifier.

Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination. CVPR 2018,
arXiv 1805.01978, eq. 2, over the whole bank. For rows x_i of the images y_i and the bank M (C, D),

    L = mean over i of lse_j(<x_i, M_j> / tau) - <x_i, M_{y_i}> / tau
"""

from typing import ClassVar

from torch import Tensor, nn

from fastret.losses.info_nce import info_nce
from fastret.losses.reduction import check_reduction
from fastret.ops import checks


def instance_softmax(
    x: Tensor,
    index: Tensor,
    bank: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    impl: str | None = None,
) -> Tensor:
    """Cross-entropy of rows against a memory bank; formula at the top of this file.

    Args:
        x: (N, D). index: (N,) integers, the row of the bank that is each row's own image. bank: (C, D).
        temperature, normalize, reduction, impl: as in ``info_nce``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is expected.
    """
    checks.check_rows(x, "x")
    checks.check_rows(bank, "bank", like=x)
    checks.check_labels(index, x, "index")
    checks.check_range(index, bank.shape[0], "index")
    return info_nce(x, bank, index, temperature=temperature, normalize=normalize, reduction=reduction, impl=impl)


class InstanceSoftmax(nn.Module):
    """Non-parametric softmax over a memory bank: ``InstanceSoftmax(0.07)(x, index, bank)``.

    L = mean over i of lse_j(<x_i, M_j> / tau) - <x_i, M_{index_i}> / tau

    Cost: two matmuls of N C D for loss and gradient of x where the bank is a buffer. Memory: O(N) and the gradients.

    Args:
        temperature: tau > 0; a 0-dim tensor receives a gradient.
        normalize, reduction, impl: as in ``fastret.functional.instance_softmax``, and so are the errors raised.
    """

    citation: ClassVar[str] = (
        "@inproceedings{wu2018unsupervised, "
        "title={Unsupervised Feature Learning via Non-Parametric Instance Discrimination}, "
        "author={Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua}, "
        "booktitle={Conference on Computer Vision and Pattern Recognition}, year={2018}}"
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str | None = None,
    ) -> None:
        super().__init__()
        checks.check_positive(temperature, "temperature")
        check_reduction(reduction)
        self.temperature = temperature
        self.normalize = normalize
        self.reduction = reduction
        self.impl = impl

    def forward(self, x: Tensor, index: Tensor, bank: Tensor) -> Tensor:
        """Loss of ``x`` (N, D), images ``index`` (N,) of ``bank`` (C, D)."""
        return instance_softmax(
            x,
            index,
            bank,
            temperature=self.temperature,
            normalize=self.normalize,
            reduction=self.reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
