"""JSON schemas as grammars: what an answer under `response_format` may look like. Pure.

What a schema demands and a grammar cannot hold is refused by name: an answer that silently misses
it would be a wrong one. Two things are narrower than JSON Schema, as models write them so: the
properties come in the order of the schema, and where `properties` are given and
`additionalProperties` is not, there are no others. Unknown keywords, and formats other than those
in `formats.py`, say nothing, as the standard has it. Nothing is ever fetched.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import msgspec

from proxy.engines.embedded import keywords, pattern
from proxy.engines.embedded.formats import FORMATS
from proxy.engines.embedded.grammar import GrammarError, Item, Rules, char_class, literal
from proxy.engines.embedded.keywords import NoValue, Schema
from proxy.engines.embedded.merging import COMPOSED, both, canonical, own
from proxy.engines.embedded.numbers import integers
from proxy.engines.embedded.other_names import other_than
from proxy.engines.embedded.spelled import fits

MAX_SCHEMA_CHARS = 64 << 10
MAX_DEPTH = 64
MAX_PARTS = 1000
"""Of one schema, by `$ref` and `allOf`."""
MAX_STEPS = 20_000
"""Of `Work`, of some 20 µs each. What shares nothing takes half of them at its longest."""

WS_MOST = 20
"""Indentation behind a line break; without a bound small models indent for ever."""


class Work:
    """What may still be done. A schema's parts count each time that they are looked at: those that
    stand beside `anyOf` as often as that has branches, so a short schema can be endless work.
    """

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self._left = steps

    def spend(self, steps: int = 1) -> None:
        """Raises GrammarError."""
        self._left -= steps
        if self._left < 0:
            raise GrammarError("The schema is too much work: its parts apply in too many places.")


def grammar_of(schema: str, work: Work | None = None) -> str:
    """GBNF of the JSON texts that the schema allows; "" allows any object. `work` is shared where
    several are tried. Raises GrammarError.
    """
    if len(schema) > MAX_SCHEMA_CHARS:
        raise GrammarError(f"The schema is longer than {MAX_SCHEMA_CHARS:,} characters.")
    try:
        value = msgspec.json.decode(schema) if schema else {"type": "object"}
    except (msgspec.DecodeError, RecursionError) as exc:
        raise GrammarError("The schema is not valid JSON, or nested too deeply.") from exc
    compiler = _Compiler(value, work or Work())
    try:
        return compiler.rules.text(compiler.visit(value, "#", 0))
    except RecursionError as exc:
        raise GrammarError("The schema is nested too deeply.") from exc


class _Compiler:
    def __init__(self, root: object, work: Work) -> None:
        self.rules = Rules()
        self._root = root
        self._work = work
        self._targets: dict[str, object] = {}
        self._refs: dict[str, Item] = {}
        self._texts: dict[str, Item] = {}
        self._integers: dict[tuple[int | None, int | None], Item] = {}
        self._value: Item | None = None

    def visit(self, schema: object, path: str, depth: int) -> Item:
        """The rule of one schema. `path` says where it stands in the whole one."""
        self._work.spend()
        if schema is True or schema == {}:
            return self._any_value()
        if not isinstance(schema, dict):
            raise GrammarError(f"The schema at {keywords.short(path)} is not an object.")
        if depth > MAX_DEPTH:
            raise GrammarError("The schema is nested too deeply.")
        keywords.check(schema, path)
        made_of = COMPOSED & schema.keys()
        if made_of == {"$ref"} and not keywords.ASSERTIONS & schema.keys():
            return self._ref(schema["$ref"], path, depth)
        if made_of:
            return self._composed(schema, path, depth)
        return self._typed(schema, path, depth)

    # -- schemas made of schemas -----------------------------------------------------------------

    def _ref(self, pointer: object, path: str, depth: int) -> Item:
        target = self._resolve(pointer, path)
        pointer = str(pointer)
        if pointer not in self._refs:
            rule = self._refs[pointer] = self.rules.reserve()
            try:
                self.rules.fill(rule, [self.visit(target, keywords.short(pointer), depth + 1)])
            except NoValue as exc:  # Others may refer to the rule by now.
                raise GrammarError(str(exc)) from exc
        return self._refs[pointer]

    def _resolve(self, pointer: object, path: str) -> object:
        if not isinstance(pointer, str):
            raise GrammarError(f"`$ref` at {keywords.short(path)} is not a text.")
        if pointer in self._targets:
            return self._targets[pointer]
        if pointer != "#" and not pointer.startswith("#/"):
            raise GrammarError(f"`$ref` {keywords.short(pointer)} is outside of the schema.")
        target = self._root
        for step in pointer.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and name.isascii() and name.isdigit() and len(name) < 6:
                target = target[int(name)] if int(name) < len(target) else None
            else:
                target = target.get(name) if isinstance(target, dict) else None
        if target is None:
            raise GrammarError(f"`$ref` {keywords.short(pointer)} leads nowhere.")
        self._targets[pointer] = target
        return target

    def _composed(self, schema: Schema, path: str, depth: int) -> Item:
        """What all its parts demand, and one branch of each choice among them."""
        alone = COMPOSED & schema.keys() == {"allOf"} and not keywords.ASSERTIONS & schema.keys()
        if alone and len(parts := keywords.list_of(schema, "allOf", path)) == 1:
            return self.visit(parts[0], path, depth + 1)  # It may be what it is a part of.
        said, choices = self._flat(schema, path)
        if not choices:
            return self._typed(said, path, depth + 1)
        shared = said if keywords.ASSERTIONS & said.keys() else {}
        open_ = {"unevaluatedProperties": said.pop("unevaluatedProperties", True)}
        parts = [*([shared] if shared else []), *({"anyOf": c} for c in choices[1:])]
        found = []
        for i, branch in enumerate(choices[0]):
            with suppress(NoValue):
                schema = {"allOf": [*parts, branch], **open_} if parts else branch
                found.append(self.visit(schema, f"{path}/anyOf/{i}", depth + 1))
        if not found:
            raise NoValue(path)
        return self._choice(found)

    def _flat(self, schema: Schema, path: str) -> tuple[dict[str, Any], list[list[Any]]]:
        """(what it and the parts of its `$ref` and `allOf` say by themselves, all their choices)"""
        said: dict[str, Any] = {}
        choices: list[list[Any]] = []
        parts: list[object] = [schema]
        for _ in range(MAX_PARTS):
            if not parts:
                return said, choices
            part = parts.pop()
            if part is True:
                continue
            if not isinstance(part, dict):
                raise GrammarError(f"`allOf` at {keywords.short(path)} holds what is no object.")
            keywords.check(part, path)
            said = both(said, own(part, path, inner=part is not schema), path)
            self._work.spend(
                1 + sum(len(v) for v in said.values() if isinstance(v, list | dict)) // 64
            )
            for key in (k for k in ("anyOf", "oneOf") if k in part):
                branches = keywords.list_of(part, key, path)
                choices += [branches] if not any(branches is c for c in choices) else []
            parts += reversed(keywords.list_of(part, "allOf", path) if "allOf" in part else [])
            parts += [self._resolve(part["$ref"], path)] if "$ref" in part else []
        raise GrammarError(f"The schema refers to itself without end, or to {MAX_PARTS} others.")

    def _choice(self, rules: Iterable[Item]) -> Item:
        found = list(dict.fromkeys(rules))
        return found[0] if len(found) == 1 else self.rules.add(*([rule] for rule in found))

    # -- schemas of one type ---------------------------------------------------------------------

    def _typed(self, schema: Schema, path: str, depth: int) -> Item:
        if "const" in schema or "enum" in schema:
            return self._enum(schema, path)
        types = keywords.types_in(schema, path) or keywords.implied_type(schema)
        if not types:
            return self._any_value()
        if schema.get("nullable") is True and "null" not in types:
            types = [*types, "null"]
        return self._choice(self._of_type(t, schema, path, depth) for t in types)

    def _of_type(self, type_: str, schema: Schema, path: str, depth: int) -> Item:
        add = self.rules.add
        match type_:
            case "object":
                return self._object(schema, path, depth)
            case "array":
                return self._array(schema, path, depth)
            case "string":
                return self._string(schema, path)
            case "integer":
                return self._integer(schema, path)
            case "number":
                return self._number(schema, path)
            case "boolean":
                return add(literal("true"), literal("false"))
            case _:
                return add(literal("null"))

    def _enum(self, schema: Schema, path: str) -> Item:
        values = keywords.list_of(schema, "enum", path) if "enum" in schema else [schema["const"]]
        if "const" in schema:
            values = [v for v in values if canonical(v) == canonical(schema["const"])]
        self._work.spend(len(values))
        fitting = [value for value in values if fits(value, schema, path)]
        if not fitting:
            raise NoValue(path)
        return self.rules.add(*(self._literal(value) for value in fitting))

    def _string(self, schema: Schema, path: str) -> Item:
        low = keywords.count_of(schema, "minLength", path) or 0
        high = keywords.count_of(schema, "maxLength", path)
        quote, bounded = literal('"'), low > 0 or high is not None
        if "pattern" in schema:
            if bounded or not isinstance(schema["pattern"], str):
                sentence = f"`pattern` with a length at {keywords.short(path)} is not supported."
                raise GrammarError(sentence)
            return self._matching(schema["pattern"])
        if found := FORMATS.get(str(schema.get("format"))):
            if low > found.shortest or (high is not None and high < found.longest):
                sentence = f"`format` with a length at {keywords.short(path)} is not supported."
                raise GrammarError(sentence)
            return self._matching(found.regex)
        inside = self.rules.repeat(
            pattern.any_char(self.rules), low, keywords.not_below(low, high, path)
        )
        return self.rules.add([*quote, *inside, *quote])

    def _matching(self, regex: str) -> Item:
        if regex not in self._texts:
            self._work.spend(len(regex) // 4)
            quote = literal('"')
            inside = pattern.matching(self.rules, regex)
            self._texts[regex] = self.rules.add([*quote, *inside, *quote])
        return self._texts[regex]

    def _integer(self, schema: Schema, path: str) -> Item:
        bounds = low, high = keywords.integer_bounds(schema, path)
        if bounds not in self._integers:
            # Digit by digit, and for each the digits behind it.
            digits = max(len(str(bound)) for bound in (low or 0, high or 0))
            self._work.spend(digits * digits // 8)
            self._integers[bounds] = integers(self.rules, low, high)
        return self._integers[bounds]

    def _number(self, schema: Schema, path: str) -> Item:
        bounds = {key: schema[key] for key in keywords.BOUNDS if schema.get(key) is not None}
        minimum = bounds.pop("minimum", None)
        if bounds or minimum not in (None, 0):
            key = next(iter(bounds), "minimum")
            raise GrammarError(f"`{key}` of a number at {keywords.short(path)} is not supported.")
        digits = char_class([(0x30, 0x39)])
        whole = self.rules.add(
            literal("0"), [char_class([(0x31, 0x39)]), *self.rules.repeat(digits, 0, 15)]
        )
        fraction = self.rules.add([], [*literal("."), *self.rules.repeat(digits, 1, 16)])
        # Two digits: a larger exponent is infinite for most readers.
        exponent = [Item("[eE]"), Item("[-+]", low=0), *self.rules.repeat(digits, 1, 2)]
        sign = [] if minimum == 0 else [Item("[-]", low=0)]
        return self.rules.add([*sign, whole, fraction, self.rules.add([], exponent)])

    def _array(self, schema: Schema, path: str, depth: int) -> Item:
        low = keywords.count_of(schema, "minItems", path) or 0
        high = keywords.not_below(low, keywords.count_of(schema, "maxItems", path), path)
        first = keywords.list_of(schema, "prefixItems", path) if "prefixItems" in schema else []
        first = first if high is None else first[:high]
        items = [self.visit(s, f"{path}/prefixItems/{i}", depth + 1) for i, s in enumerate(first)]
        others = schema.get("items", not items)
        if others is False or others is None or high == len(items):
            high = len(items)
        rest_high = None if high is None else high - len(items)
        if rest_high == 0:
            if low > len(items):
                raise NoValue(path)
            return self._bracketed("[", self._listed(items), "]")
        rest_low = max(0, low - len(items))
        item = self.visit(others, f"{path}/items", depth + 1)
        return self._bracketed("[", self._repeated(items, item, rest_low, rest_high), "]")

    def _repeated(self, items: list[Item], item: Item, low: int, high: int | None) -> list[Item]:
        """`items`, then `item` so many times; commas between all."""
        again = self.rules.add([*self._comma(), item])
        if items:
            return [*self._listed(items), *self.rules.repeat(again, low, high)]
        # Commas stand between: the first one has none.
        more = None if high is None else high - 1
        some = [item, *self.rules.repeat(again, max(0, low - 1), more)]
        return some if low else [self.rules.add([], some)]

    def _listed(self, items: list[Item]) -> list[Item]:
        return [x for i, item in enumerate(items) for x in (*(self._comma() if i else ()), item)]

    def _object(self, schema: Schema, path: str, depth: int) -> Item:
        properties, required = self._properties(schema, path)
        closed = schema.get("unevaluatedProperties", True) is False
        others = schema.get("additionalProperties", not closed and not properties)
        properties |= {
            name: schema.get("additionalProperties", not closed)
            for name in sorted(required - properties.keys())
        }
        if lost := [name for name in properties if name in required and properties[name] is False]:
            name = keywords.short(lost[0])
            raise GrammarError(
                f"The schema at {keywords.short(path)} demands {name!r} and forbids it."
            )
        where = f"{path}/properties"
        pairs = [
            self._pair(
                self._literal(name), self.visit(s, f"{where}/{keywords.short(name)}", depth + 1)
            )
            for name, s in properties.items()
            if s is not False
        ]
        more = None
        if others is not False:
            value = self.visit(others, f"{path}/additionalProperties", depth + 1)
            more = self._pair([self._other_key(list(properties))], value)
        needed = [name in required for name, s in properties.items() if s is not False]
        return self._members(pairs, needed, more)

    def _properties(self, schema: Schema, path: str) -> tuple[dict[str, Any], set[str]]:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            raise GrammarError(f"`properties` at {keywords.short(path)} is not an object.")
        if not isinstance(required, list) or not all(isinstance(r, str) for r in required):
            raise GrammarError(f"`required` at {keywords.short(path)} is not a list of names.")
        return dict(properties), set(required)

    def _members(self, pairs: list[Item], required: list[bool], more: Item | None) -> Item:
        """An object with these pairs in order, those that are not required left out at will.

        From the last one back: `some` is what begins with a pair from here on (None: nothing can),
        `must` whether one has to come.
        """
        add, comma = self.rules.add, self._comma()
        again = self.rules.repeat(add([*comma, more]), 0, None) if more else []
        some = add([more, *again]) if more else None
        must = False
        for pair, needed in zip(reversed(pairs), reversed(required), strict=True):
            rest = [add([*comma, some]) if must else add([], [*comma, some])] if some else []
            here = add([pair, *rest])
            some = here if needed or not some else self._choice([here, some])
            must = must or needed
        if some is None:
            return add(literal("{}"))
        inside = [self._ws(), some, self._ws()]
        return add(
            [*literal("{"), *(inside if must else [add([self._ws()], inside)]), *literal("}")]
        )

    def _bracketed(self, opening: str, inside: list[Item], closing: str) -> Item:
        return self.rules.add(
            [*literal(opening), self._ws(), *inside, self._ws(), *literal(closing)]
        )

    def _pair(self, key: list[Item], value: Item) -> Item:
        return self.rules.add([*key, *literal(":"), self._ws(), value])

    def _other_key(self, names: list[str]) -> Item:
        """A key that is none of these. It is written without escapes: they could spell one."""
        if not names:
            return self._string({}, "#")
        self._work.spend(sum(map(len, names)) // 4)
        return self.rules.add([*literal('"'), other_than(self.rules, names), *literal('"')])

    def _literal(self, value: object) -> list[Item]:
        text = _json(value)
        self._work.spend(len(text) // 64)
        return literal(text)

    def _comma(self) -> list[Item]:
        return [*literal(","), self._ws()]

    def _ws(self) -> Item:
        indent = Item("[ \\t]", low=0, high=WS_MOST)
        return self.rules.add([], literal(" "), [*literal("\n"), indent])

    def _any_value(self) -> Item:
        if self._value is None:
            self._value = self.rules.reserve()
            kinds = [self._of_type(t, {}, "#", 0) for t in keywords.TYPES if t != "integer"]
            self.rules.fill(self._value, *([kind] for kind in kinds))
        return self._value


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
