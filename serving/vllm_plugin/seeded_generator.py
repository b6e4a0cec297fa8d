"""Give torch's CPU generators the offset that vLLM's model runner rewinds.

After each part of a prompt but the last, vLLM draws a token and discards it (`_bookkeeping_sync` in
vllm/v1/worker/gpu_model_runner.py): it rewinds the generator of a request with a `seed` by an offset, which only CUDA
generators have. On a CPU this raises "CPU Generator does not use offset", and the engine terminates. vLLM has the same
defect for XPU fixed in the pull request below.
"""

from typing import Any

from serving.vllm_plugin.patch import Patch


def resettable(generator_class: Any) -> Any:
    """Derive a generator class whose CPU instances accept offsets; setting one restarts from the seed.

    vLLM only rewinds before the first token that counts, so a restart is a rewind: the answer doesn't depend on how the
    prompt was split. A request that was preempted in the middle of its answer restarts from the seed, too.
    """

    class AcceptsOriginal(type(generator_class)):  # type: ignore[misc]
        """Generators that torch itself made are instances, too."""

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, generator_class)

    class ResettableGenerator(generator_class, metaclass=AcceptsOriginal):  # type: ignore[misc]
        """torch.Generator with the two methods that it lacks on a CPU."""

        def get_offset(self) -> int:
            return 0 if self.device.type == "cpu" else int(super().get_offset())

        def set_offset(self, offset: int) -> None:
            if self.device.type == "cpu":
                self.manual_seed(self.initial_seed())
            else:
                super().set_offset(offset)

    return ResettableGenerator


def _lacks_offset() -> bool:
    import torch  # noqa: PLC0415

    try:
        torch.Generator(device="cpu").get_offset()
    except RuntimeError:
        return True
    return False


def _replace_generator() -> None:
    import torch  # noqa: PLC0415

    torch.Generator = resettable(torch.Generator)


SEEDED_GENERATOR = Patch(
    "seeded generator", "https://github.com/vllm-project/vllm/pull/43028", _lacks_offset, _replace_generator
)
