"""Run a warp-specialised Gluon kernel in plain Python, and find its races and deadlocks.

Triton's interpreter can't run Gluon. `Simulator` executes the source of a kernel's module as it is, launcher included,
with stand-ins for Triton: a tensor of registers is a PyTorch tensor, and each partition of `warp_specialize` is a
thread. One thread runs at a time, up to its next operation on barriers or shared memory. A schedule then chooses what
comes next: a step of a partition, the arrival of a copy, or the end of a matmul, which both may be late. So any order
that the hardware may take can be tried. Barriers follow PTX's `mbarrier`: a phase is complete when no arrival and no
byte is pending. In any schedule, `SimulatedFault` is raised when

* all partitions wait, and no copy or matmul is under way;
* a matmul reads a slot before its partition has waited for the copy, even if the copy happens to be there;
* a copy overwrites a slot that another copy fills, or that a matmul reads which its partition has not waited for;
* registers are read before a wait for the matmuls that write them;
* a barrier gets more arrivals than it counts;
* a global address is outside its tensor, or written twice;
* a program ends while copies or matmuls are under way.

The last value of a slot that no partition has read may be overwritten without a fault; the results are wrong then.
"""

import builtins
import inspect
import operator
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

KINDS = ("consumer 0", "consumer 1", "producer", "copy", "matmul")


class SimulatedFault(AssertionError):
    """The kernel has broken one of the rules."""


class _Stop(BaseException):
    """Ends the thread of a partition after a fault in another one."""


class Int(int):
    """A scalar of a kernel."""

    def to(self, dtype: torch.dtype) -> "Int":
        return self


def _on_ints(name: str) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        result = getattr(int, name)(self, other)
        return Int(result) if type(result) is int else result

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "xor"):
    setattr(Int, f"__{_name}__", _on_ints(f"__{_name}__"))
    setattr(Int, f"__r{_name}__", _on_ints(f"__r{_name}__"))


class Pointer:
    """Addresses in a tensor of global memory."""

    def __init__(self, base: Tensor, written: Tensor, offsets: Any = 0) -> None:
        self.base, self.written, self.offsets = base, written, offsets

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.base, self.written, self.offsets + more)

    def inside(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mask and the offsets, those that are masked out replaced by 0."""
        mask = torch.ones_like(self.offsets, dtype=torch.bool) if mask is None else mask
        offsets = self.offsets.long().where(mask, 0)
        if bool(((offsets < 0) | (offsets >= self.base.numel())).any()):
            raise SimulatedFault("a global address is outside its tensor")
        return mask, offsets


class Barrier:
    """One `mbarrier`."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0  # phase: how many are complete

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int, bytes: int = 0) -> None:
        self.bytes += bytes
        self.pending -= count
        if self.pending < 0 or not self.count:
            raise SimulatedFault("a barrier gets more arrivals than it counts")
        self.close()

    def close(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def complete(self, parity: int) -> bool:
        """Whether the last phase of this parity is complete; the one before the first counts."""
        return self.phase % 2 != parity


class Slot:
    """A block of shared memory, filled by one copy at a time."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.values = torch.full(tuple(shape), torch.nan, dtype=dtype)
        self.copying = False
        self.after: tuple[Barrier, int] | None = None  # the phase after which the copy has arrived
        self.readers: list[Matmul] = []


class Memory:
    """Shared memory: slots or barriers by index."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def index(self, i: int) -> Any:
        return self.items[i] if isinstance(self.items[i], Barrier) else View(self.items[i])


class View:
    """Some rows of a slot, or their transpose."""

    def __init__(self, slot: Slot, rows: slice = slice(None), transposed: bool = False) -> None:
        self.slot, self.rows, self.transposed = slot, rows, transposed

    def slice(self, start: int, length: int, dim: int) -> "View":
        assert dim == 0
        return View(self.slot, slice(start, start + length), self.transposed)

    def permute(self, order: tuple[int, int]) -> "View":
        assert order == (1, 0)
        return View(self.slot, self.rows, not self.transposed)

    def read(self) -> Tensor:
        values = self.slot.values[self.rows].float()
        return values.T if self.transposed else values


class Accumulator:
    """Registers that asynchronous matmuls write; they are a tensor again after a wait for all of these."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.writers: list[Matmul] = []

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        raise SimulatedFault("registers are read while a matmul may still write them")


def _read_in_flight(*_: Any) -> Any:
    Accumulator.__torch_function__()


for _name in ("add", "sub", "mul", "radd", "rsub", "rmul", "neg"):
    setattr(Accumulator, f"__{_name}__", _read_in_flight)


class Matmul:
    """An asynchronous matmul, which may read and write at any time until its partition has waited for it."""

    def __init__(self, a: View, b: View, accumulator: Accumulator, adds: bool) -> None:
        self.a, self.b, self.accumulator, self.adds, self.done = a, b, accumulator, adds, False

    def run(self) -> None:
        product = self.a.read() @ self.b.read()
        target = self.accumulator
        target.values = target.values + product if self.adds else product
        self.done = True


class Partition(threading.Thread):
    """One partition of a program, in a thread that runs only when the program lets it."""

    def __init__(self, program: "Program", name: str, function: Callable[..., None], args: Sequence[Any]) -> None:
        super().__init__(name=name, daemon=True)
        self.program, self.function, self.args = program, function, args
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = "its first step"
        self.finished = False
        self.matmuls: list[Matmul] = []  # in flight, oldest first
        self.seen: dict[Barrier, int] = {}  # phases that it has waited for

    def run(self) -> None:
        try:
            self.turn.acquire()
            if not self.program.error:
                self.function(*self.args)
        except _Stop:
            pass
        except BaseException as error:
            self.program.error = self.program.error or error
        self.finished = True
        self.program.turn.release()

    def pause(self, ready: Callable[[], bool], waits_for: str) -> None:
        """Let the others run, and go on when `ready`."""
        self.ready, self.waits_for = ready, waits_for
        self.program.turn.release()
        self.turn.acquire()
        if self.program.error:
            raise _Stop


class Program:
    """One program of the grid."""

    def __init__(self, pid: int, programs: int, choose: Callable[[list[str]], str]) -> None:
        self.pid, self.programs, self.choose = pid, programs, choose
        self.turn = threading.Semaphore(0)
        self.partitions: list[Partition] = []
        self.copies: list[Callable[[], None]] = []
        self.error: BaseException | None = None

    def run(self, functions_and_args: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Run the partitions to their ends, in an order of the schedule's choice."""
        for name, (function, args) in zip(KINDS, functions_and_args, strict=False):
            self.partitions.append(Partition(self, name, function, args))
        for partition in self.partitions:
            partition.start()
        while not self.error and any(not p.finished for p in self.partitions):
            try:
                self.step()
            except SimulatedFault as error:
                self.error = error
        self.stop()
        if self.copies or any(p.matmuls for p in self.partitions):
            raise SimulatedFault("a program ends while copies or matmuls are under way")

    def step(self) -> None:
        able: dict[str, Callable[[], None]] = {}
        for partition in self.partitions:
            if not partition.finished and partition.ready():
                able[partition.name] = lambda p=partition: self.resume(p)
        if self.copies:
            able["copy"] = lambda: self.copies.pop(self.any_of(self.copies))()
        due = [next((m for m in p.matmuls if not m.done), None) for p in self.partitions]
        if unfinished := [m for m in due if m]:
            able["matmul"] = lambda: unfinished[self.any_of(unfinished)].run()
        if not able:
            waiting = ", ".join(f"{p.name} for {p.waits_for}" for p in self.partitions if not p.finished)
            raise SimulatedFault(f"deadlock: {waiting}")
        able[self.choose(list(able))]()

    def any_of(self, items: list[Any]) -> int:
        return int(self.choose([str(i) for i in range(len(items))]))

    def resume(self, partition: Partition) -> None:
        partition.turn.release()
        self.turn.acquire()

    def stop(self) -> None:
        if self.error:
            for partition in self.partitions:
                if not partition.finished:
                    partition.turn.release()
        for partition in self.partitions:
            partition.join()
        if self.error:
            raise self.error


class Kernel:
    """A jitted function, which a launch runs program by program and another one calls."""

    def __init__(self, simulator: "Simulator", fn: Callable[..., Any]) -> None:
        self.simulator, self.fn = simulator, fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            known = inspect.signature(self.fn).parameters
            bound = inspect.signature(self.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in known})
            for name, value in bound.arguments.items():
                if isinstance(value, Tensor):
                    written = torch.zeros(value.numel(), dtype=torch.bool)
                    bound.arguments[name] = Pointer(value.view(-1), written)
                elif type(value) is int:
                    bound.arguments[name] = Int(value)
            for pid in range(grid[0]):
                self.simulator.program = Program(pid, grid[0], self.simulator.choose)
                self.fn(*bound.args, **bound.kwargs)

        return launch


class Descriptor:
    """A TMA descriptor: blocks of a tensor, zeros past its edges."""

    def __init__(self, base: Tensor, block_shape: list[int]) -> None:
        self.base, self.block_shape, self.dtype, self.layout = base, block_shape, base.dtype, None
        self.block_type = SimpleNamespace(nbytes=block_shape[0] * block_shape[1] * base.element_size())

    @staticmethod
    def from_tensor(base: Tensor, block_shape: list[int], layout: object) -> "Descriptor":
        return Descriptor(base, block_shape)

    def block(self, start: Sequence[int]) -> Tensor:
        rows, columns = (slice(int(i), int(i) + size) for i, size in zip(start, self.block_shape, strict=True))
        block = torch.zeros(self.block_shape, dtype=self.dtype)
        inside = self.base[rows, columns]
        block[: inside.shape[0], : inside.shape[1]] = inside
        return block


class Simulator:
    """A module of Gluon kernels, executed with stand-ins for Triton.

    Args:
        source: the text of the module.
        order: kinds of `KINDS`, the one that goes first whenever it can in front; kinds that are left out take turns at
            random after them.
        seed: of the random turns.
    """

    def __init__(self, source: str, order: Sequence[str] = (), seed: int = 0) -> None:
        self.order, self.random = order, random.Random(seed)
        self.program = Program(0, 1, self.choose)
        self.namespace: dict[str, Any] = {"__name__": "simulated"}
        triton = self.stand_in()
        language = triton.experimental.gluon.language

        def import_(name: str, *args: Any) -> Any:
            if name.partition(".")[0] != "triton":
                return builtins.__import__(name, *args)
            from_names = args[2] if len(args) > 2 else None
            return operator.attrgetter(name)(SimpleNamespace(triton=triton)) if from_names else triton

        hooks = {"__import__": import_, "range": _range}
        self.namespace["__builtins__"] = vars(builtins) | hooks
        exec(compile(source, "simulated", "exec"), self.namespace)
        for name, value in list(self.namespace.items()):
            if hasattr(value, "fn") and not isinstance(value, Kernel):  # a device function of another module
                names = vars(inspect.getmodule(value.fn)) | {"tl": language, "__builtins__": vars(builtins) | hooks}
                self.namespace[name] = FunctionType(value.fn.__code__, names)

    def choose(self, names: list[str]) -> str:
        """Choose one of the names of what can happen next."""
        return min(names, key=lambda name: (self.order.index(name) if name in self.order else 9, self.random.random()))

    def stand_in(self) -> Any:
        """Return what stands in for the module `triton`."""

        def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
            return Kernel(self, fn) if fn is not None else lambda fn: Kernel(self, fn)

        language = SimpleNamespace(
            constexpr=object, int32=torch.int32, int64=torch.int64, float32=torch.float32,
            float16=torch.float16, bfloat16=torch.bfloat16,
            program_id=lambda axis: Int(self.program.pid), num_programs=lambda axis: Int(self.program.programs),
            cdiv=lambda a, b: (a + b - 1) // b, static_range=_range,
            minimum=lambda a, b: Int(min(a, b)), maximum=torch.maximum, abs=torch.abs, exp2=torch.exp2, log2=torch.log2,
            where=torch.where, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
            arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            reshape=torch.reshape, split=lambda x: x.unbind(-1), convert_layout=lambda x, layout: x,
            load=_load, store=_store, allocate_shared_memory=_allocate,
            warp_specialize=lambda functions, warps, registers: self.program.run(functions),
            NVMMADistributedLayout=_layout, SliceLayout=_layout,
            NVMMASharedLayout=SimpleNamespace(get_default_for=_layout),
        )  # fmt: skip
        hopper = SimpleNamespace(
            mbarrier=SimpleNamespace(
                MBarrierLayout=_layout, init=Barrier.init, expect=_expect, arrive=_arrive, wait=_wait
            ),
            tma=SimpleNamespace(async_load=_async_load),
            warpgroup_mma=_warpgroup_mma,
            warpgroup_mma_wait=_warpgroup_mma_wait,
        )
        language.nvidia = SimpleNamespace(hopper=hopper)
        gluon = SimpleNamespace(
            jit=jit, language=language, nvidia=SimpleNamespace(hopper=SimpleNamespace(TensorDescriptor=Descriptor))
        )
        return SimpleNamespace(
            experimental=SimpleNamespace(gluon=gluon), language=language, cdiv=lambda a, b: -(-a // b)
        )


def _me() -> Partition:
    partition = threading.current_thread()
    assert isinstance(partition, Partition), "only partitions touch barriers and shared memory"
    return partition


def _step(what: str) -> Partition:
    """Let others run before an operation that they may notice."""
    partition = _me()
    partition.pause(lambda: True, what)
    return partition


def _range(*args: int) -> Iterator[Int]:
    return map(Int, range(*map(int, args)))


def _layout(*args: Any, **kwargs: Any) -> None:
    return None


def _allocate(dtype: torch.dtype, shape: list[int], layout: object) -> Memory:
    if dtype == torch.int64:
        return Memory([Barrier() for _ in range(shape[0])])
    return Memory([Slot(shape[1:], dtype) for _ in range(shape[0])])


def _load(pointer: Pointer, mask: Tensor | None = None, other: float = 0) -> Tensor:
    mask, offsets = pointer.inside(mask)
    return torch.where(mask, pointer.base[offsets], other)


def _store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    mask, offsets = pointer.inside(mask)
    if bool(pointer.written[offsets[mask]].any()):
        raise SimulatedFault("a global address is written twice")
    pointer.written[offsets[mask]] = True
    pointer.base[offsets[mask]] = value[mask].to(pointer.base.dtype)


def _expect(barrier: Barrier, bytes: int, pred: bool = True) -> None:
    _step("its turn to expect bytes")
    if pred:
        barrier.arrive(1, bytes)


def _arrive(barrier: Barrier, count: int = 1, pred: bool = True) -> None:
    _step("its turn to arrive")
    if pred:
        barrier.arrive(count)


def _wait(barrier: Barrier, parity: int) -> None:
    partition = _me()
    partition.pause(
        lambda: barrier.complete(int(parity)), f"parity {parity} of a barrier with {barrier.phase} phases complete"
    )
    partition.seen[barrier] = barrier.phase


def _async_load(descriptor: Descriptor, start: Sequence[int], barrier: Barrier, view: View) -> None:
    partition = _step("its turn to copy")
    slot = view.slot
    if slot.copying or slot.readers:
        raise SimulatedFault("a copy overwrites a slot that another copy fills, or that a matmul may still read")
    slot.copying = True
    slot.values.fill_(torch.nan)
    slot.after = barrier, barrier.phase + 1

    def arrive() -> None:
        slot.values.copy_(descriptor.block(start))
        slot.copying = False
        barrier.bytes -= descriptor.block_type.nbytes
        barrier.close()

    partition.program.copies.append(arrive)


def _warpgroup_mma(
    a: View, b: View, acc: Tensor | Accumulator, use_acc: bool = True, is_async: bool = False
) -> Accumulator:
    partition = _step("its turn to multiply")
    assert is_async
    for view in (a, b):
        barrier, phase = view.slot.after or (None, 0)
        if view.slot.copying or barrier is None or partition.seen.get(barrier, -1) < phase:
            raise SimulatedFault("a matmul reads a slot before its partition has waited for the copy")
    accumulator = acc if isinstance(acc, Accumulator) else Accumulator(acc)
    matmul = Matmul(a, b, accumulator, bool(use_acc))
    for readers in (a.slot.readers, b.slot.readers, accumulator.writers, partition.matmuls):
        readers.append(matmul)
    return accumulator


def _warpgroup_mma_wait(outstanding: int, deps: list[Any]) -> Any:
    partition = _me()
    waited_for = partition.matmuls[: max(0, len(partition.matmuls) - outstanding)]
    partition.pause(lambda: all(m.done for m in waited_for), "a matmul")
    for matmul in waited_for:
        for readers in (matmul.a.slot.readers, matmul.b.slot.readers, matmul.accumulator.writers, partition.matmuls):
            readers.remove(matmul)
    (accumulator,) = deps
    if isinstance(accumulator, Accumulator) and not accumulator.writers:
        return accumulator.values
    return accumulator
