"""Nothing is read on the host and no device is mixed: ``fake_device.py``, without a GPU."""

from own_process import run_tests


def test_on_a_fake_device() -> None:
    # The shared fixtures install the CPU runtime, which moves everything to the CPU.
    run_tests("helpers/fake_device.py", "--noconftest")
