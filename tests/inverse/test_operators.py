import numpy as np
import pytest
import torch

from inverse import get_operator
from inverse.operators import OPERATORS
from inverse.operators.kernels import gaussian_kernel, motion_kernel
from tests.golden_utils import golden_arrays

SIZES = [(16, 16), (13, 18), (5, 9)]
LINEAR = [
    ("inpainting", {"fraction": 0.7}),
    ("inpainting", {"box": (1, 2, 3, 4)}),
    ("gaussian_blur_circ", {"kernel_size": 9, "std": 1.5}),
    ("gaussian_blur_circ", {}),  # a 61x61 kernel wraps around these sizes
    ("motion_blur_circ", {"kernel_size": 7, "seed": 3}),
    ("motion_blur_circ", {"kernel_size": 8, "seed": 3}),
    ("super_resolution", {"factor": 1}),
    ("super_resolution", {"factor": 3}),
    ("super_resolution", {}),
]
NONLINEAR = [
    ("phase_retrieval", {}),
    ("high_dynamic_range", {}),
    ("nonlinear_blur", {"kernel_size": 5}),
]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def delta(size):
    kernel = torch.zeros(size, size)
    kernel[size // 2, size // 2] = 1
    return kernel


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "params"), LINEAR)
def test_adjoint_identity(name, params, channels, size):
    operator = get_operator(name, **params)
    x = normal(2, channels, *size)
    y = normal(*operator.measurement_shape(x.shape), seed=1)
    ax, aty = operator.forward(x), operator.adjoint(y, size)
    assert ax.shape == y.shape and aty.shape == x.shape
    for i in range(2):
        left, right = (ax[i] * y[i]).sum().item(), (x[i] * aty[i]).sum().item()
        assert left == pytest.approx(right, abs=1e-10 * x.numel())
    left, right = (operator.forward(x.float()) * y.float()).sum(), (x.float() * operator.adjoint(y.float(), size)).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("name", "params"), LINEAR)
def test_misfit_gradient_of_linear_operators_is_that_of_autograd(name, params):
    operator = get_operator(name, **params)
    x = normal(2, 1, 13, 18).requires_grad_()
    y = normal(*operator.measurement_shape(x.shape), seed=1)
    wanted = torch.autograd.grad((operator.forward(x) - y).square().sum(), x)[0]
    torch.testing.assert_close(operator.misfit_gradient(x.detach(), y), wanted)


@pytest.mark.parametrize("size", [(8, 8), (8, 16)])
@pytest.mark.parametrize(("name", "params"), NONLINEAR)
def test_misfit_gradient_of_nonlinear_operators_against_finite_differences(name, params, size):
    operator = get_operator(name, **params)
    x, y = 0.4 * normal(1, 1, *size), normal(*operator.measurement_shape((1, 1, *size)), seed=1)
    gradient = operator.misfit_gradient(x, y)
    step = 1e-5
    for k in range(0, x.numel(), 7):
        e = torch.zeros_like(x)
        e.view(-1)[k] = step
        difference = sum(s * (operator.forward(x + s * e) - y).square().sum().item() for s in (1, -1)) / (2 * step)
        assert gradient.flatten()[k].item() == pytest.approx(difference, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("name", "params"), LINEAR + NONLINEAR)
def test_operators_state_what_they_can_do(name, params):
    operator = get_operator(name, **params)
    linear = name in {name for name, _ in LINEAR}
    assert operator.is_linear is linear and operator.has_exact_step is linear
    assert hasattr(operator, "adjoint") is linear and hasattr(operator, "sample_conditional") is linear


def test_every_operator_is_tested_here():
    assert {name for name, _ in LINEAR + NONLINEAR} == set(OPERATORS)


def test_golden_gaussian_blur_and_its_exact_step():
    golden = golden_arrays("operators.npz")
    operator = get_operator("gaussian_blur_circ", kernel_size=61, std=3.0)
    x, noise, noisy = golden["x"], golden["noise"], golden["gblur_y_noisy"]

    def close(value, entry):
        assert (value - golden[entry]).abs().max() <= 1e-4 * golden[entry].abs().max()

    close(operator.forward(x), "gblur_y")
    close(operator.sample_conditional(x, noisy, (2e-3 / 2) ** 0.5, 0.3, lambda x: noise), "gblur_prox")
    close(operator.sample_conditional(x, noisy, (2e-3 / 2) ** 0.5, 0.3, torch.zeros_like), "gblur_prox_mean")


def test_golden_super_resolution():
    golden = golden_arrays("operators.npz")
    y = get_operator("super_resolution", factor=4).forward(golden["x"])
    assert (y - golden["sr4_y"]).abs().max() <= 1e-4 * golden["sr4_y"].abs().max()


def test_golden_motion_kernel():
    wanted = golden_arrays("operators.npz")["mblur_kernel_seed0"].double()
    kernel = get_operator("motion_blur_circ").kernel
    assert (kernel - wanted).abs().max() <= 1e-4 * wanted.max()
    assert kernel.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("size", "std"), [(61, 3.0), (9, 3.0), (4, 5.0), (1, 0.2)])
def test_gaussian_kernel_is_the_filtered_impulse(size, std):
    from scipy.ndimage import gaussian_filter

    np.testing.assert_allclose(
        gaussian_kernel(size, std), gaussian_filter(delta(size).double().numpy(), std), atol=1e-15
    )


def test_motion_kernels_differ_by_seed_and_repeat():
    assert np.array_equal(motion_kernel(15, 0.5, 1), motion_kernel(15, 0.5, 1))
    assert abs(motion_kernel(15, 0.5, 1) - motion_kernel(15, 0.5, 2)).max() > 0.01
    for intensity in (0.0, 1.0):
        kernel = motion_kernel(15, intensity, 0)
        assert kernel.min() >= 0 and kernel.sum() == pytest.approx(1)


@pytest.mark.parametrize("kernel_size", [1, 4, 5, 31])
@pytest.mark.parametrize("name", ["gaussian_blur_circ", "motion_blur_circ", "nonlinear_blur"])
def test_a_delta_kernel_moves_nothing(name, kernel_size):
    x = normal(1, 3, 12, 9).clamp(-1.5, 1.5)
    torch.testing.assert_close(get_operator(name, kernel=delta(kernel_size)).forward(x), x, atol=1e-7, rtol=0)


def test_factor_1_and_nothing_removed_change_nothing():
    x = normal(1, 3, 12, 9)
    torch.testing.assert_close(get_operator("super_resolution", factor=1).forward(x), x)
    assert torch.equal(get_operator("inpainting", fraction=0).forward(x), x)
    assert torch.equal(get_operator("high_dynamic_range", scale=0.1).forward(x), 0.1 * x)


def test_blurs_convolve_and_do_not_correlate():
    kernel = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.3], [0.0, 0.0, 0.2]])  # right and below the centre
    x = torch.zeros(1, 1, 6, 6)
    x[0, 0, 2, 5] = 1
    y = get_operator("motion_blur_circ", kernel=kernel).forward(x)[0, 0]
    assert [round(y[i, j].item(), 6) for i, j in [(2, 5), (2, 0), (3, 0)]] == [0.5, 0.3, 0.2]
    assert y.sum().item() == pytest.approx(1)


def test_large_kernels_wrap_around():
    kernel = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
    x = normal(1, 1, 5, 5)
    tiled = torch.nn.functional.pad(x, (3, 3, 3, 3), mode="circular")
    wanted = torch.nn.functional.conv2d(tiled, kernel.double().flip(0, 1)[None, None])
    torch.testing.assert_close(get_operator("motion_blur_circ", kernel=kernel).forward(x), wanted)


def test_super_resolution_of_flat_and_sloping_images():
    operator = get_operator("super_resolution", factor=4)
    torch.testing.assert_close(operator.forward(torch.full((1, 1, 10, 7), 0.3)), torch.full((1, 1, 3, 2), 0.3))
    ramp = torch.arange(48, dtype=torch.float64).expand(1, 1, 48, 48)
    inner = operator.forward(ramp)[0, 0, 5, 3:-3]
    torch.testing.assert_close(inner, 4 * torch.arange(3, 9, dtype=torch.float64) + 1.5)


def test_inpainting_masks():
    box = get_operator("inpainting", box=(64, 64, 128, 128)).mask(256, 256)
    assert box[64:192, 64:192].sum() == 0 and box.sum() == 256**2 - 128**2
    random = get_operator("inpainting", fraction=0.7, seed=4)
    mask = random.mask(20, 30)
    assert mask.sum() == 180 and torch.equal(mask, get_operator("inpainting", fraction=0.7, seed=4).mask(20, 30))
    assert not torch.equal(mask, get_operator("inpainting", fraction=0.7, seed=5).mask(20, 30))
    x = normal(2, 3, 20, 30)
    assert torch.equal(random.forward(x), x * mask)
    assert torch.equal(get_operator("inpainting", mask=mask.bool().numpy()).forward(x), x * mask)


def test_phase_retrieval_against_numpy():
    x = normal(2, 3, 8, 16)
    y = get_operator("phase_retrieval", oversample=4).forward(x)
    padded = np.pad((x.numpy() + 1) / 2, ((0, 0), (0, 0), (4, 4), (8, 8)))
    wanted = abs(np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(padded, axes=(2, 3)), norm="ortho"), axes=(2, 3)))
    np.testing.assert_allclose(y.numpy(), wanted, atol=1e-12)
    assert y[0, 0, 8, 16] == y[0, 0].max()  # the mean of a non-negative image sits in the centre


def test_high_dynamic_range_clips():
    x = torch.tensor([-1.0, -0.5, -0.2, 0.0, 0.4, 0.5, 0.9]).reshape(1, 1, 1, 7)
    wanted = torch.tensor([-1.0, -1.0, -0.4, 0.0, 0.8, 1.0, 1.0])
    torch.testing.assert_close(get_operator("high_dynamic_range").forward(x).flatten(), wanted)


def test_nonlinear_blur_mixes_light_rather_than_pixel_values():
    half = torch.full((2, 2), 0.25)
    x = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).reshape(1, 1, 2, 2)
    y = get_operator("nonlinear_blur", kernel=half).forward(x)
    # half the light of white is sRGB value 187.5 of 255
    torch.testing.assert_close(y, torch.full_like(y, 2 * 187.5 / 255 - 1), atol=2e-3, rtol=0)
    assert get_operator("nonlinear_blur").kernel.shape == (61, 61)


def test_residual_is_per_image():
    operator = get_operator("super_resolution")
    x = normal(2, 1, 8, 8)
    y = operator.forward(x)
    y[1] += 0.5
    torch.testing.assert_close(operator.residual(x, y), torch.tensor([0.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("deblur", {}, "no operator 'deblur': use one of inpainting, gaussian_blur_circ"),
        ("super_resolution", {"scale": 4}, "no parameter scale: it takes factor"),
        ("super_resolution", {"factor": 1.5}, "factor must be a whole number"),
        ("super_resolution", {"factor": "four"}, "factor must be a whole number from 1 to 1024, not .four."),
        ("super_resolution", {"factor": None}, "not None"),
        ("high_dynamic_range", {"scale": "two"}, "scale must be a positive number up to 1e6, not .two."),
        ("phase_retrieval", {"oversample": True}, "oversample must be a number from 0 to 64, not True"),
        (
            "gaussian_blur_circ",
            {"kernel": [[1], [2, 3]]},
            "blur kernel must be rows of numbers, all of one length",
        ),
        ("inpainting", {"box": 5}, "top, left, height, width in pixels, not 5"),
        ("inpainting", {}, "exactly one of mask, box or fraction"),
        ("inpainting", {"fraction": 0.5, "box": (0, 0, 1, 1)}, "exactly one"),
        ("inpainting", {"fraction": 1.0}, r"in \[0, 1\)"),
        ("inpainting", {"fraction": 0.5, "seed": -1}, "seed must be"),
        ("inpainting", {"box": (0, 0, 3)}, "top, left, height, width"),
        ("inpainting", {"mask": torch.full((4, 4), 0.5)}, r"of 0 .removed. and 1 .*\[4, 4\] with other values"),
        ("inpainting", {"mask": torch.ones(3, 4, 4)}, r"this one is \[3, 4, 4\]$"),
        ("gaussian_blur_circ", {"std": 0}, "std of a Gaussian kernel"),
        ("gaussian_blur_circ", {"std": 1e12}, "std of a Gaussian kernel"),
        ("motion_blur_circ", {"kernel_size": 1 << 20}, "kernel_size must be a whole number from 3 to 2048"),
        ("super_resolution", {"factor": 1 << 30}, "factor must be a whole number from 1 to 1024"),
        ("phase_retrieval", {"oversample": 1e9}, "oversample must be a number from 0 to 64"),
        ("gaussian_blur_circ", {"kernel_size": 0}, "kernel_size must be"),
        ("motion_blur_circ", {"intensity": 1.5}, r"intensity of a motion kernel must lie in \[0, 1\]"),
        ("motion_blur_circ", {"kernel": torch.zeros(3)}, r"blur kernel must be \[h,w\]"),
        ("nonlinear_blur", {"kernel": torch.full((3, 3), float("nan"))}, "finite numbers"),
        ("phase_retrieval", {"oversample": -1}, "oversample"),
        ("high_dynamic_range", {"scale": 0}, "scale must be a positive number"),
    ],
)
def test_parameters_that_make_no_sense(name, params, message):
    with pytest.raises(ValueError, match=message) as error:
        get_operator(name, **params)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "params", "shape", "message"),
    [
        ("inpainting", {"box": (4, 4, 8, 8)}, (1, 1, 8, 8), "reaches beyond images of 8x8"),
        ("inpainting", {"mask": torch.ones(4, 4)}, (1, 1, 8, 8), r"\[4, 4\] and the images are \[8, 8\]"),
        ("phase_retrieval", {}, (1, 1, 7, 8), "3.5 and 4 pixels, which must be whole"),
        ("super_resolution", {}, (1, 8, 8), r"images must be \[N,C,H,W\]"),
        ("gaussian_blur_circ", {}, (8, 8), r"images must be \[N,C,H,W\]"),
        ("high_dynamic_range", {}, (8,), r"images must be \[N,C,H,W\]"),
        ("nonlinear_blur", {}, (1, 0, 8, 8), "no empty dimension"),
    ],
)
def test_images_that_do_not_fit(name, params, shape, message):
    with pytest.raises(ValueError, match=message):
        get_operator(name, **params).forward(torch.zeros(shape))


def test_measurements_that_do_not_fit():
    operator = get_operator("super_resolution")
    with pytest.raises(ValueError, match=r"\[1, 3, 8, 8\] do not fit: images \[1, 3, 8, 8\] give .* \[1, 3, 2, 2\]"):
        operator.sample_conditional(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), 0.1, 0.1)
    with pytest.raises(ValueError, match="do not fit"):
        operator.residual(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="4x fewer pixels than 20x8"):
        operator.adjoint(torch.zeros(1, 3, 2, 2), (20, 8))


@pytest.mark.parametrize("params", [{"mask": np.zeros((4, 4))}, {"box": [0, 0, 4, 4]}, {"fraction": 0.99}])
def test_inpainting_measures_something(params):
    with pytest.raises(ValueError, match="removes every pixel of images of 4x4: nothing is measured"):
        get_operator("inpainting", **params).forward(torch.zeros(1, 1, 4, 4))
