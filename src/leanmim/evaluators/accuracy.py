"""An accuracy, and how far it can be trusted."""

from math import sqrt
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie within so many standard deviations


class Accuracy(float):
    """Share of images that are classified right, 0 to 1; as text with its interval and the number of images.

    Args:
        right: images that are classified right.
        images: all that were classified.
    """

    right: int
    images: int

    def __new__(cls, right: int, images: int) -> "Accuracy":
        """Count, do not divide: the interval needs both numbers."""
        self = super().__new__(cls, right / images)
        self.right, self.images = right, images
        return self

    def __reduce__(self) -> tuple[type["Accuracy"], tuple[int, int]]:
        return type(self), (self.right, self.images)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval of 95 % (JASA 22, 1927), which Brown, Cai and DasGupta (2001) recommend for few images.

        It knows of the choice of validation images only: not of another seed, nor of other training images.
        """
        share, weight = float(self), Z**2 / self.images
        centre, half = share + weight / 2, sqrt(weight * (share * (1 - share) + weight / 4))
        return max(0.0, (centre - half) / (1 + weight)), min(1.0, (centre + half) / (1 + weight))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f}, {self.images:,} images)"


class Resampled(Accuracy):
    """A measure whose interval is that of a bootstrap over images.

    Args:
        value: of all images, 0 to 1.
        interval: its ends.
        images: how many.
    """

    def __new__(cls, value: float, interval: tuple[float, float], images: int) -> "Resampled":  # type: ignore[override]
        """The value and its interval, which are known."""
        self = float.__new__(cls, value)
        self._interval, self.images = interval, images
        return self

    _interval: tuple[float, float]

    def __reduce__(self) -> tuple[type["Resampled"], tuple[float, tuple[float, float], int]]:  # type: ignore[override]
        return type(self), (float(self), self._interval, self.images)

    @property
    def interval(self) -> tuple[float, float]:
        """That of the bootstrap."""
        return self._interval
