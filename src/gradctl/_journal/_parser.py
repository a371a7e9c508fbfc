"""From lines to records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradctl._journal._norms import decode_norms
from gradctl._journal._records import (
    SCHEMA,
    Block,
    Clip,
    End,
    Event,
    Journal,
    Maxima,
    OptimizerRecord,
    Row,
    RunRecord,
    Saved,
    SavedPlace,
)

_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)


class Parser:
    """Collects the records of one journal, line by line; counts what it cannot read."""

    def __init__(self) -> None:
        self.understood = 0
        self.bad_lines = 0
        self._cut = False
        self._newer = False
        self._run: RunRecord | None = None
        self._end: End | None = None
        self._optimizers: dict[int, OptimizerRecord] = {}
        self._blocks: list[Block] = []
        self._maxima: list[Maxima] = []
        self._rows: list[Row] = []
        self._events: list[Event] = []
        self._saved_bytes: list[Saved] = []
        self._readers: dict[str, Callable[[dict[str, Any]], None]] = {
            "run": self._read_run,
            "opt": self._read_optimizer,
            "b": self._read_block,
            "mx": self._read_maxima,
            "row": self._read_row,
            "event": self._read_event,
            "saved": self._read_saved,
            "end": self._read_end,
        }

    def take(self, line: bytes | None, whole: bool) -> None:
        """Read one line; None stands for one that was too long, `whole` says that it ended."""
        if line is not None and not line.strip():
            return
        try:
            if line is None:
                raise ValueError("too long")
            record = json.loads(line)
            kind = record["k"]
            reader = self._readers.get(_text(kind))
            if reader is not None:
                reader(record)
            self.understood += 1
        except _UNREADABLE:
            if whole:
                self.bad_lines += 1
            else:
                self._cut = True

    def take_open_blocks(self, records: list[Any]) -> None:
        """Add the blocks of a journal's tail that lie beyond its own last ones, if the journal was not ended."""
        if self._end is not None:
            return
        known = list(self._blocks)
        for record in records:
            self._blocks = []
            try:
                self._read_block(record)
            except _UNREADABLE:
                continue
            (block,) = self._blocks
            if block.n > max((other.n + other.c - 1 for other in known if other.o == block.o), default=0):
                known.append(block)
        self._blocks = known

    def journal(self, path: Path) -> Journal:
        """Return what was read, in order of steps."""
        return Journal(
            path=path,
            run=self._run,
            optimizers=self._optimizers,
            blocks=tuple(sorted(self._blocks, key=lambda b: (b.o, b.n))),
            maxima=tuple(sorted(self._maxima, key=lambda m: (m.o, m.n))),
            rows=tuple(sorted(self._rows, key=lambda r: (r.o, r.n))),
            events=tuple(self._events),
            saved=tuple(self._saved_bytes),
            end=self._end,
            bad_lines=self.bad_lines,
            cut=self._cut,
            newer=self._newer,
        )

    def _read_run(self, r: dict[str, Any]) -> None:
        schema = r.get("schema")
        if not isinstance(schema, str) or not schema.startswith("gradctl.journal/"):
            raise ValueError("schema")
        self._newer = schema != SCHEMA
        self._run = RunRecord(
            schema=schema,
            argv=tuple(str(a) for a in r.get("argv") or ()),
            script=_text(r.get("script")),
            cwd=_text(r.get("cwd")),
            pid=_whole(r.get("pid", 0)),
            ppid=_whole(r.get("ppid", 0)),
            rank=_whole(r.get("rank", 0)),
            world_size=max(1, _whole(r.get("world_size", 1))),
            host=_text(r.get("host")),
            python=_text(r.get("python")),
            torch=_text(r.get("torch")),
            gradctl=_text(r.get("gradctl")),
            platform=_text(r.get("platform")),
            threads=_whole(r.get("threads", 0)),
            device=_text(r.get("device")),
            main=bool(r.get("main", True)),
            started=_real(r.get("started", 0.0)),
            start=_text(r.get("start", "run")),
            grad=_text(r.get("grad", "on")),
            budget=_real(r.get("budget", 0.01)),
        )

    def _read_optimizer(self, r: dict[str, Any]) -> None:
        names = tuple(None if name is None else str(name) for name in r.get("names") or ())
        groups = r.get("groups") or ()
        self._optimizers[_whole(r["o"])] = OptimizerRecord(
            o=_whole(r["o"]),
            cls=_text(r.get("cls")),
            names=names,
            shapes=tuple(tuple(_whole(d) for d in shape) for shape in r.get("shapes") or ()),
            dtypes=tuple(_text(d) for d in r.get("dtypes") or ()),
            groups=tuple(_whole(g) for g in groups) if groups else (0,) * len(names),
            lr=tuple(_real(value) for value in r.get("lr") or ()),
            numel=_whole(r.get("numel", 0)),
            frozen=_whole(r.get("frozen", 0)),
            thread=_text(r.get("thread")),
            named=_text(r.get("named", "none")),
            roots=tuple((str(cls), _whole(count)) for cls, count in r.get("roots") or ()),
            source=_text(r.get("source", "optimizer")),
        )

    def _read_block(self, r: dict[str, Any]) -> None:
        loss, clip, norm = r.get("l"), r.get("clip"), r.get("tot")
        times = [_real(value) for value in r.get("ms") or (0, 0, 0, 0)]
        self._blocks.append(
            Block(
                o=_whole(r["o"]),
                n=_step(r["n"]),
                c=_step(r["c"]),
                t=_real(r.get("t", 0.0)),
                loss=(_real(loss[0]), _real(loss[1]), _real(loss[2])) if loss else None,
                bad=_whole(r.get("bad", 0)),
                microbatches=_whole(r.get("mb", 0)),
                step_ms=times[0],
                backward_ms=times[1],
                optimizer_ms=times[2],
                data_ms=times[3],
                clip=Clip(_whole(clip[0]), _whole(clip[1]), *(_real(value) for value in clip[2:6])) if clip else None,
                norm=(_real(norm[0]), _real(norm[1])) if norm else None,
            )
        )

    def _read_maxima(self, r: dict[str, Any]) -> None:
        first, count = _step(r["n"]), _step(r.get("c", 1))
        last = max(_step(r.get("to", first + count - 1)), first)
        self._maxima.append(Maxima(_whole(r["o"]), first, last, count, decode_norms(r["g"])))

    def _read_row(self, r: dict[str, Any]) -> None:
        self._rows.append(
            Row(
                o=_whole(r["o"]),
                n=_step(r["n"]),
                t=_real(r.get("t", 0.0)),
                g=decode_norms(r["g"]),
                u=decode_norms(r.get("u") or ()),
                none=_whole(r.get("none", 0)),
                zero=_whole(r.get("zero", 0)),
                lr=tuple(_real(value) for value in r.get("lr") or ()),
                **{key: _maybe(r.get(key)) for key in ("tot", "dead", "cos", "rss", "cuda")},
            )
        )

    def _read_event(self, r: dict[str, Any]) -> None:
        data = {key: value for key, value in r.items() if key not in ("k", "e", "t", "o", "n")}
        step, optimizer = r.get("n"), r.get("o")
        self._events.append(
            Event(
                e=str(r["e"]),
                t=_real(r.get("t", 0.0)),
                o=None if optimizer is None else _whole(optimizer),
                n=None if step is None else _whole(step),
                data=data,
            )
        )

    def _read_saved(self, r: dict[str, Any]) -> None:
        places = tuple(
            SavedPlace(str(where), None if module is None else str(module), _whole(size), _whole(count))
            for where, module, size, count in r.get("rows") or ()
        )
        self._saved_bytes.append(
            Saved(_whole(r.get("n", 0)), _whole(r["total"]), _whole(r.get("count", 0)), _text(r.get("method")), places)
        )

    def _read_end(self, r: dict[str, Any]) -> None:
        code, exc = r.get("code"), r.get("exc")
        self._end = End(
            how=_text(r.get("how")),
            code=None if code is None else _whole(code),
            exc=dict(exc) if exc else None,
            steps={int(o): _whole(n) for o, n in dict(r.get("steps") or {}).items()},
            losses={int(o): (_maybe(pair[0]), _maybe(pair[1])) for o, pair in dict(r.get("losses") or {}).items()},
            backwards=_whole(r.get("backwards", 0)),
            **{key: _real(r.get(key, 0.0)) for key in ("cost", "one_off", "wall", "share")},
            faults=_whole(r.get("faults", 0)),
            dropped={str(name): _whole(count) for name, count in dict(r.get("dropped") or {}).items()},
            rss=_maybe(r.get("rss")),
            not_seen=tuple((str(what), str(why)) for what, why in r.get("not_seen") or ()),
            bytes=_whole(r.get("bytes", 0)),
            children=tuple(_whole(pid) for pid in r.get("children") or ()),
            tiers=dict(r.get("tiers") or {}),
        )


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 1 << 62:
        raise TypeError("not a whole number")
    return value


def _step(value: Any) -> int:
    if _whole(value) < 1:
        raise ValueError("steps and counts are at least 1")
    return value


def _real(value: Any) -> float:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("not a number")
    return float(value)


def _maybe(value: Any) -> float | None:
    return None if value is None else _real(value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("not text")
    return value
