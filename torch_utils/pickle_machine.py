"""A stack machine for pickles that cannot import: every name a file uses is looked up in a given vocabulary.

The built-in unpickler resolves names by importing modules and calls what it finds. This one treats a name as a pair of
strings; whether it may occur, and what it does, is said by a `Vocabulary`. Only the instructions that checkpoints need
exist, and lengths are checked before memory is set aside.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

MAX_STEPS = 1_000_000  # instructions and entries looked at; the largest published checkpoints need about a fifth
_MAX_KEY = 1 << 16

_MARK = object()
_LITERALS = "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
_LITERALS += ["BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"]
_PUSHES: dict[str, Callable[["Machine", Any], Any]] = {  # what an instruction of the machine, with its argument, pushes
    "NONE": lambda m, _: None, "NEWTRUE": lambda m, _: True, "NEWFALSE": lambda m, _: False,
    "EMPTY_DICT": lambda m, _: {}, "EMPTY_LIST": lambda m, _: [], "EMPTY_SET": lambda m, _: set(),
    "EMPTY_TUPLE": lambda m, _: (), "MARK": lambda m, _: _MARK,
    "BINGET": lambda m, index: m.memo[index], "LONG_BINGET": lambda m, index: m.memo[index],
    "TUPLE1": lambda m, _: tuple(m.pop(1)), "TUPLE2": lambda m, _: tuple(m.pop(2)),
    "TUPLE3": lambda m, _: tuple(m.pop(3)), "TUPLE": lambda m, _: tuple(m.pop_mark()),
    "FROZENSET": lambda m, _: frozenset(scalar_key(item) for item in m.pop_mark()),
    "GLOBAL": lambda m, text: m.name(*text.split(" ", 1)), "STACK_GLOBAL": lambda m, _: m.name(*m.pop(2)),
    "REDUCE": lambda m, _: m.call(*m.pop(2)), "NEWOBJ": lambda m, _: m.create(*m.pop(2)),
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint file is damaged, incomplete, or not what it should be."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint file asks for something outside the allowed set."""


@dataclass(frozen=True)
class Name:
    """A global that a pickle names. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}")[1:-1][:100]


@dataclass(eq=False)
class Record:
    """An object of a class that is not imported: the names it was stored under and its attributes."""

    module: str  # module named by the file; "torch_utils.persistence" for objects of persistent classes
    qualname: str  # class name
    state: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Vocabulary:
    """What the names in a pickle stand for."""

    functions: Mapping[Name, Callable[..., Any]] = field(default_factory=dict)  # f(machine, *arguments), checks them
    classes: Mapping[Name, Callable[[], Any]] = field(default_factory=dict)  # f() is what an object of it becomes
    words: frozenset[Name] = frozenset()  # may be mentioned, cannot be called
    builders: Mapping[type, Callable[..., None]] = field(default_factory=dict)  # f(machine, object, its state)


class BoundedReader:
    """The stream that pickletools reads from: clamps each length to what is left, before memory is set aside."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self.tell = file, size, file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(max(min(count, self._size - self.tell()), 0))

    def readline(self) -> bytes:
        return self._file.readline(max(min(1024, self._size - self.tell()), 0))


class Machine:
    """Executes one pickle. Raises UnsafeCheckpointError for what is not allowed, anything for damaged input."""

    def __init__(self, file: BinaryIO, size: int, vocabulary: Vocabulary, persistent: Callable | None = None) -> None:
        self.reader, self.vocabulary, self.persistent = BoundedReader(file, size), vocabulary, persistent
        self.position = 0  # byte at which the current instruction stands
        self._budget = 4 * size + (1 << 16)  # bytes that functions may still allocate
        self._stack: list[Any] = []
        self.memo: list[Any] = []  # in order, as every pickler numbers; chosen numbers could make a dictionary slow
        self.steps = 0

    def run(self) -> Any:
        """Reads up to the end of one pickle and returns its value."""
        for count, (opcode, argument, position) in enumerate(pickletools.genops(self.reader)):
            self.position = position or 0
            if count == 0 and (opcode.name != "PROTO" or not 2 <= argument <= 5):
                raise ValueError("does not begin as a pickle of protocol 2 to 5")
            self.work(1)
            if opcode.name == "STOP":
                (result,) = self.pop(1)
                if self._stack:
                    raise ValueError("values left over at the end")
                return result
            self._step(opcode.name, argument)
        raise ValueError("no end found")

    def spend(self, count: int) -> None:
        """Accounts for `count` bytes about to be allocated by a function of the vocabulary."""
        self._budget -= count
        if self._budget < 0:
            raise UnsafeCheckpointError("unfolds to much more data than the file holds")

    def work(self, count: int) -> None:
        """Accounts for `count` steps about to be taken: parts of a file may be shared, and looked at many times."""
        self.steps += count
        if self.steps > MAX_STEPS:
            raise UnsafeCheckpointError(f"needs more than {MAX_STEPS} steps to be read")

    def _step(self, opcode: str, argument: Any) -> None:
        push = self._stack.append
        if opcode in _LITERALS:
            if type(argument) is int and argument.bit_length() > 128:
                raise ValueError("integer of more than 128 bits")
            push(argument)
        elif opcode in _PUSHES:
            push(_PUSHES[opcode](self, argument))
        elif opcode in ("PROTO", "FRAME"):
            pass
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(self.memo) if argument is None else argument
            if index > len(self.memo):
                raise ValueError("values are not numbered in order")
            self.memo[index : index + 1] = [self._top()]
        elif opcode in ("APPEND", "APPENDS"):
            items = self.pop(1) if opcode == "APPEND" else self.pop_mark()
            self._top(list).extend(items)
        elif opcode == "ADDITEMS":
            items = self.pop_mark()
            self._top(set).update(scalar_key(item) for item in items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self.pop(2) if opcode == "SETITEM" else self.pop_mark()
            self._top(dict).update((scalar_key(k), v) for k, v in zip(items[::2], items[1::2], strict=True))
        elif opcode == "BUILD":
            self._build(*self.pop(1))
        elif opcode == "BINPERSID" and self.persistent is not None:
            push(self.persistent(*self.pop(1)))
        else:
            raise UnsafeCheckpointError(f"uses the instruction {opcode}, which no known checkpoint needs")

    def _top(self, kind: type = object) -> Any:
        top = self._stack[-1]
        if top is _MARK or (kind is not object and type(top) is not kind):
            raise ValueError(f"expected a {kind.__name__} on the stack")
        return top

    def pop(self, count: int) -> list[Any]:
        items = self._stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise ValueError("too few values on the stack")
        del self._stack[-count:]
        return items

    def pop_mark(self) -> list[Any]:
        for count, item in enumerate(reversed(self._stack)):
            if item is _MARK:
                items = self.pop(count) if count else []
                self._stack.pop()
                return items
        raise ValueError("no mark on the stack")

    def name(self, module: Any, name: Any) -> Name:
        if type(module) is not str or type(name) is not str:
            raise UnsafeCheckpointError("names a global by something other than text")
        found, known = Name(module, name), self.vocabulary
        if not (found in known.functions or found in known.classes or found in known.words):
            raise UnsafeCheckpointError(f"names {found}, which is not on the list of what a checkpoint may use")
        return found

    def call(self, function: Any, arguments: Any) -> Any:
        if type(function) is not Name or function not in self.vocabulary.functions:
            raise UnsafeCheckpointError(f"calls {_describe(function)}")
        if type(arguments) is not tuple:
            raise ValueError(f"arguments of {function} are not a tuple")
        return self.vocabulary.functions[function](self, *arguments)

    def create(self, cls: Any, arguments: Any) -> Any:
        if type(cls) is not Name or cls not in self.vocabulary.classes or type(arguments) is not tuple or arguments:
            raise UnsafeCheckpointError(f"creates an object of {_describe(cls)}")
        return self.vocabulary.classes[cls]()

    def _build(self, state: Any) -> None:
        target = self._top()
        if build := self.vocabulary.builders.get(type(target)):
            build(self, target, state)
        elif type(target) is Record:
            if target.state:
                raise UnsafeCheckpointError(f"sets the state of {target} twice")
            target.state = attributes(self, state)
        elif type(target) is not dict or state not in (None, {}):
            raise UnsafeCheckpointError(f"sets the state of a {type(target).__name__}")


def attributes(machine: Machine, state: Any) -> dict[str, Any]:
    """The instance dictionary of an object, checked to be one."""
    machine.work(len(state) if type(state) is dict else 1)
    if type(state) is not dict or not all(type(key) is str for key in state):
        raise UnsafeCheckpointError("sets the state of an object to something other than its attributes")
    return state


def scalar_key(key: Any) -> Any:
    """A dictionary key or set member: text, a truth value, None or a small number. The hash of nested tuples can take
    exponential time, and numbers can be chosen such that a dictionary of them takes quadratic time.
    """
    if type(key) not in (str, bool, type(None)) and not (type(key) is int and 0 <= key < _MAX_KEY):
        raise ValueError(f"a {type(key).__name__} as dictionary key or set member that no checkpoint uses")
    return key


def _describe(item: Any) -> str:
    return str(item) if type(item) is Name else f"a {type(item).__name__}"
