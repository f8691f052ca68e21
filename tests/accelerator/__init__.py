"""A simulated accelerator: tensors that say they are on a device, with the CPU's arithmetic behind.

It stands for CUDA and MPS where no card is there. torch knows it as the device `sim`, a backend of
its own (PrivateUse1), so that the code under test runs unchanged. What it enforces:

- **Mixed devices** raise as on a card: a tensor of `sim` beside one of the CPU. Only numbers
  (0-dimensional CPU tensors) and indices on the CPU pass, as torch lets them pass.
- **float64** raises: MPS has none.
- A **generator of the CPU** given to an operation on the device raises; the device has a random
  state of its own.
- **Waits** are recorded with their place: each `item`, copy to the host, blocking copy to the
  device, and each operation whose output's shape depends on values (`nonzero`, boolean index).
- **Memory** is counted. It can run out at any allocation (`run_out_at`) or above a number of bytes
  (`capacity_bytes`); both raise `torch.OutOfMemoryError`.
- The device can **fail for good** (`fail`): every later operation raises, as after a device-side
  assert, until `reset`.
- A tensor whose **non-blocking copy** to the device is under way may not change before the next
  wait. `grit_core.transfer` copies like that, as on CUDA; patch `transfer.is_asynchronous` to see
  the blocking copies of MPS.

Within a backward pass memory that runs out and a device that fails are seen at the end of the pass:
what comes between is computed.

What it cannot show: limits of kernels (alignment, types, determinism), NCCL, streams, real memory,
speed. It takes the single-tensor paths of torch's optimizers.

In a test, take the fixture `accelerator`:

    def test_a_step_waits_three_times(accelerator):
        model.to("sim")
        with accelerator.waits() as waits:
            step()
        assert waits.count("grit_core") <= 3, waits
"""

from tests.accelerator.backend import NAME, install
from tests.accelerator.device import Accelerator, DeviceMix, accelerator
from tests.accelerator.waits import Wait, Waits

__all__ = ["NAME", "Accelerator", "DeviceMix", "Wait", "Waits", "accelerator", "install"]
