"""Mistakes that operators made in configuration files, and what is to be said of each."""

# One replica behind one alias; a mistake replaces one of its lines, or is added.
GATEWAY = 'gateway: {listen: "127.0.0.1:0", admin: "127.0.0.1:0"}'
VARIANTS = "variants:\n  a: {precision: bf16, quality: {top1_agreement: 0.99}}"
REPLICAS = 'replicas:\n  - {variant: a, url: "http://127.0.0.1:28122"}'
ALIASES = "aliases:\n  m: {ladder: [a]}"
VALID = f"{GATEWAY}\n{VARIANTS}\n{REPLICAS}\n{ALIASES}\n"
OWN = "variants:\n  a: {path: model}"


def document(gateway: str = GATEWAY, variants: str = VARIANTS, replicas: str = REPLICAS, aliases: str = ALIASES) -> str:
    """The valid document, with other parts."""
    return "".join(f"{part}\n" for part in (gateway, variants, replicas, aliases) if part)


def listening(**options: str) -> str:
    """The table of the gateway with other options."""
    chosen = {"listen": '"127.0.0.1:0"', "admin": '"127.0.0.1:0"', **options}
    return f"gateway: {{{', '.join(f'{name}: {value}' for name, value in chosen.items())}}}"


def alias(options: str) -> str:
    """The alias with more options."""
    return f"aliases:\n  m: {{ladder: [a], {options}}}"


def replica(*options: str) -> str:
    """Replicas of this machine."""
    return "replicas:\n" + "\n".join(f"  - {{variant: a{', ' if text else ''}{text}}}" for text in options)


FINE = [VALID, VALID.replace("\n", "\r\n"), "\ufeff" + VALID, document(gateway=listening(listen='"127.0.0.2:0"'))]

# The document, its exit code, and what is said of it; an own replica's model directory exists.
MISTAKES: list[tuple[str, int, list[str]]] = [
    (VALID.replace("aliases", "alliases"), 2, ["f:6:1: alliases: unknown key; did you mean 'aliases'?"]),
    (
        document(aliases="aliases:\n  m: {laddre: [a]}"),
        2,
        [
            "f:7:3: aliases.m.ladder: is missing; add 'ladder: ...'",
            "f:7:7: aliases.m.laddre: unknown key; did you mean 'ladder'?",
        ],
    ),
    (
        document(aliases="aliases:\n  m: {ladder: a}"),
        2,
        ["f:7:7: aliases.m.ladder: must be a list, got 'a'; write [a]"],
    ),
    (
        document(aliases="aliases:\n  m: {ladder: [a, qwq-int4]}"),
        2,
        ["f:7:19: aliases.m.ladder.1: unknown variant 'qwq-int4'; known: a"],
    ),
    (
        document(gateway=listening(keys="nokeys.yaml")),
        2,
        [
            "f:1:56: gateway.keys: DIR/nokeys.yaml: keys can't be read: No such file or directory; "
            "create the file with `quantgate keys create NAME --file DIR/nokeys.yaml`"
        ],
    ),
    (
        document(aliases=alias("spill: {after_seconds: -1}")),
        2,
        ["f:7:28: aliases.m.spill.after_seconds: must be at least 0, got -1; choose a larger number"],
    ),
    (
        document(aliases="aliases:\nm: {ladder: [a]}"),
        2,
        [
            "f:6:1: aliases: is empty; indent its entries below it, or remove the line",
            "f:7:1: m: unknown key; known: aliases, gateway, replicas, serving, variants",
        ],
    ),
    (
        document(aliases=ALIASES + "\nvariants:\n  b: {precision: int4}"),
        2,
        ["f:8:1: variants: is a duplicate key; keep one"],
    ),
    (
        document(aliases=alias("floor: {top1_agreement: 0.999}, trust_declared: true")),
        3,
        [
            "f:7:3: aliases.m: no variant is good enough (a: top1_agreement 0.99 misses the floor 0.999); "
            "lower the floor, or add a better variant [unservable]"
        ],
    ),
    (
        document(
            variants=VARIANTS + "\n  b: {precision: int4, quality: {top1_agreement: 0.9}}",
            replicas=REPLICAS + '\n  - {variant: b, url: "http://127.0.0.1:28123"}',
            aliases="aliases:\n  m: {ladder: [a, b], floor: {top1_agreement: 0.95}, trust_declared: true}",
        ),
        0,
        [
            "f:9:19: aliases.m.ladder.1: 'b' is never chosen: top1_agreement 0.9 misses the floor 0.95; "
            "remove it from the ladder [warning]"
        ],
    ),
    (
        document(gateway=listening(listen="localhost")),
        2,
        [
            "f:1:11: gateway.listen: 'localhost' is not a valid address; write host:port, for example 127.0.0.1:8000",
        ],
    ),
    (
        document(gateway=listening(listen='"0.0.0.0:0"')),
        2,
        [
            "f:1:11: gateway.listen: 0.0.0.0:0 is reachable from other machines, but gateway.keys is not set; "
            "set gateway.keys, or use 127.0.0.1"
        ],
    ),
    (
        document(variants=VARIANTS + "\n  gpt: {external: gpt-4.1}"),
        2,
        [
            "f:4:9: variants.gpt.external: 'gpt-4.1' is not an external model; "
            "write PROVIDER/MODEL as litellm names it, such as openai/gpt-4.1"
        ],
    ),
    (
        document(variants=VARIANTS + "\n  gpt: {external: openai/gpt-4.1, precision: bf16, path: model}"),
        2,
        [
            "f:4:35: variants.gpt.precision: is set together with external; remove one",
            "f:4:52: variants.gpt.path: is set together with external; remove one",
        ],
    ),
    (
        document(variants="variants:\n  a: {precision: bf16, api_key: k, max_in_flight: 9}"),
        2,
        [
            "f:3:24: variants.a.api_key: is an option of external models, but external is not set; remove it",
            "f:3:36: variants.a.max_in_flight: is an option of external models, but external is not set; remove it",
        ],
    ),
    (
        document(variants=VARIANTS + "\n  gpt: {external: openai/gpt-4.1, credentials: {api_base: x}}"),
        2,
        ["f:4:49: variants.gpt.credentials.api_base: 'api_base' is not valid; config/example.yaml describes it"],
    ),
    (
        document(
            variants=VARIANTS + "\n  gpt: {external: openai/gpt-4.1}",
            replicas=REPLICAS + "\n  - {variant: gpt}",
            aliases="aliases:\n  m: {ladder: [gpt, a]}",
        ),
        2,
        [
            "f:7:6: replicas.1.variant: 'gpt' is an external model, which needs no replica; remove this entry",
            "f:9:21: aliases.m.ladder.1: 'a' is behind an external model, which only takes what no replica can; "
            "put external models last",
        ],
    ),
    (
        document(variants=VARIANTS + "\n  gpt: {external: openai/no-such-model, budget: {usd_per_day: 5}}"),
        2,
        [
            "f:4:41: variants.gpt.budget: litellm knows no price of openai/no-such-model, so nothing would be counted; "
            "set price, or remove budget"
        ],
    ),
    (
        document(
            variants=VARIANTS + "\n  gpt: {external: openai/gpt-4.1, budget: {usd_per_day: 5}}",
            aliases="aliases:\n  m: {ladder: [a, gpt], floor: {top1_agreement: 0.9}, trust_declared: true}",
        ),
        0,
        [
            "f:8:19: aliases.m.ladder.1: 'gpt' is never chosen: top1_agreement is unknown, the floor is 0.9; "
            "remove it from the ladder [warning]"
        ],
    ),
    (
        "- a\n- b\n",
        2,
        [
            "f:1:1: must be a mapping, got a list; write 'name: value' lines of gateway, serving, variants, replicas, "
            "aliases"
        ],
    ),
    (
        document(replicas='replicas:\n  - {variant: a, max_in_flight: yes, url: "http://127.0.0.1:28122"}'),
        2,
        ["f:5:18: replicas.0.max_in_flight: must be a whole number, got 'yes'; write digits only"],
    ),
    (
        document(replicas='replicas:\n  - {variant: a, max_in_flight: true, url: "http://127.0.0.1:28122"}'),
        2,
        ["f:5:18: replicas.0.max_in_flight: must be a whole number, got 'true'; write digits only"],
    ),
    (
        document(aliases=alias("floor: {top1_agreement: 95%}")),
        2,
        ["f:7:28: aliases.m.floor.top1_agreement: must be a number, got '95%'; write 0.95 for 95 %"],
    ),
    (
        document(aliases=alias("floor: {top1_agreement: 95}")),
        2,
        ["f:7:28: aliases.m.floor.top1_agreement: must be at most 1, got 95; write 0.95 for 95 %"],
    ),
    (
        document(variants="variants:\n  a: {path: /nope/model}", replicas=replica("dtype: auto")),
        2,
        ["f:3:7: variants.a.path: /nope/model: no such directory; write the path of a model directory"],
    ),
    (
        document(variants="variants:\n  4: {precision: bf16}"),
        2,
        [
            "f:5:6: replicas.0.variant: unknown variant 'a'; known: 4",
            "f:7:16: aliases.m.ladder.0: unknown variant 'a'; known: 4",
        ],
    ),
    (
        document(aliases="aliases:\n  my model: {ladder: [a]}"),
        2,
        ["f:7:3: aliases.my model: 'my model' is not a valid name; use letters, digits and . _ : / -"],
    ),
    (
        document(variants=OWN, replicas=replica("port: 80")),
        2,
        ["f:5:18: replicas.0.port: must be at least 1024, got 80; choose a larger number"],
    ),
    (
        document(gateway=listening(memory_bytes="512 mb")),
        2,
        [
            "f:1:56: gateway.memory_bytes: '512 mb' is not a valid size; "
            "write a number with B, KiB, MiB, GiB, KB, MB, GB"
        ],
    ),
    (
        document(aliases=alias("spill: {after_seconds: 2s}")),
        2,
        ["f:7:28: aliases.m.spill.after_seconds: must be a number, got '2s'; write the number without a unit"],
    ),
    (
        "x-base: &b {ladder: [a]}\n" + document(aliases="aliases:\n  m: {<<: *b}"),
        2,
        ["f:1:1: x-base: unknown key; write the &anchor where it is used first, then <<: *anchor"],
    ),
    (
        document(replicas="replicas:"),
        2,
        ["f:4:1: replicas: is empty; write its entries below it, or [] for none"],
    ),
    (
        document(aliases=alias("spill: {after_seconds: .inf}")),
        2,
        ["f:7:28: aliases.m.spill.after_seconds: must be a finite number, got .inf; write a number, such as 86400"],
    ),
    (
        document(gateway=listening(listen='"::1:28120"')),
        2,
        ["f:1:11: gateway.listen: '::1:28120' is not a valid address; write an IPv6 address in brackets, [::1]:28120"],
    ),
    (
        document(replicas="", aliases=""),
        0,
        ["f:3:3: variants.a: no replica serves it; add one under replicas, or remove the variant [warning]"],
    ),
    (
        document(gateway=listening(admin='"192.0.2.1:1"', admin_key="k")),
        2,
        [
            "f:1:34: gateway.admin: can't listen on 192.0.2.1: it is not an address of this machine; "
            "write an address of this machine, such as 127.0.0.1 or 0.0.0.0"
        ],
    ),
    (
        document(gateway=listening(certificate="c.pem")),
        2,
        [
            "f:1:56: gateway.certificate: unknown key; set certificate and key_file under gateway.tls",
        ],
    ),
    (
        document(replicas='replicas:\n  - {variant: a, url: "https://127.0.0.1:28122", ca: ca.pem}'),
        2,
        [
            "f:5:50: replicas.0.ca: DIR/ca.pem can't be read: No such file or directory; name a PEM file",
        ],
    ),
    (
        document(variants=OWN, replicas=replica("count: 1000000000")),
        2,
        ["f:5:18: replicas.0.count: must be at most 1024, got 1000000000; choose a smaller number"],
    ),
    (
        document(aliases="aliases:\n  m:"),
        2,
        ["f:7:3: aliases.m: is empty; indent its entries below it, or remove the line"],
    ),
    (
        document(gateway=listening(state="state.db")),
        2,
        [
            "f:1:56: gateway.state: 'state.db' is not a database URL; "
            "write sqlite:///state.db, or postgresql://USER:PASSWORD@HOST/NAME"
        ],
    ),
    (
        document(gateway=listening(state='"mysql://u:hunter2@h/d"')),
        2,
        [
            "f:1:56: gateway.state: 'mysql://u:***@h/d' is not a database URL; "
            "write sqlite:///state.db, or postgresql://USER:PASSWORD@HOST/NAME"
        ],
    ),
    (
        document(variants="variants:\n  a: {precision: bf16, path: 2026-13-45}"),
        2,
        ["f:3:24: variants.a.path: DIR/2026-13-45: no such directory; write the path of a model directory"],
    ),
    (
        document(variants=OWN, replicas="replicas:\n- variant: a\n  gpus: 0\n  args: --enforce-eager"),
        2,
        [
            "f:6:3: replicas.0.gpus: must be a list, got 0; write [0]",
            "f:7:3: replicas.0.args: must be a list, got '--enforce-eager'; write [--enforce-eager]",
        ],
    ),
    (
        document(variants="variants:\n  a: {path: $HOME/models/x}", replicas=replica("")),
        2,
        ["f:3:7: variants.a.path: $HOME is not replaced; write ${env:HOME}"],
    ),
    (
        document(variants='variants:\n  a: {path: "${HOME}/models/x"}', replicas=replica("")),
        2,
        ["f:3:7: variants.a.path: ${HOME} is not replaced; write ${env:HOME} for an environment variable"],
    ),
    (
        document(variants="variants:\n  a: {precision: int3}"),
        2,
        [
            "f:3:7: variants.a.precision: must be 'bf16', 'fp16', 'fp32', 'fp8', 'fp4', 'int8' or "
            "'int4', got 'int3'; "
            "did you mean 'int8'?"
        ],
    ),
    (
        document(replicas=REPLICAS + '\n  - {variant: a, url: "http://127.0.0.1:28122"}'),
        2,
        ["f:6:18: replicas.1.url: is the url of replicas.0, too; remove one: both are one server"],
    ),
    (
        document(gateway=listening(listen='"127.0.0.1:28122"')),
        2,
        ["f:5:18: replicas.0.url: is the gateway itself (gateway.listen); write the address of a vLLM server"],
    ),
    (
        document(variants=OWN, replicas=replica("port: 28130, count: 2", "port: 28131")),
        2,
        ["f:6:18: replicas.1.port: port 28131 is already used by replicas.0; choose another port"],
    ),
    (
        document(gateway=listening(admin='"127.0.0.1:28130"'), variants=OWN, replicas=replica("port: 28130")),
        2,
        ["f:5:18: replicas.0.port: port 28130 is already used by gateway.admin; choose another port"],
    ),
    (
        document(variants=OWN, replicas=replica("count: 3, port: 65534")),
        2,
        ["f:5:28: replicas.0.port: count 3 takes the ports 65534 to 65536, beyond 65535; choose a port up to 65533"],
    ),
    (
        document(variants="variants:\n  a: {path: sealed, precision: bf16}"),
        2,
        ["f:3:21: variants.a.precision: is bf16, but the manifest of DIR/sealed says int4; remove precision"],
    ),
    (
        document(replicas="replicas: []"),
        3,
        ["f:6:3: aliases.m: no replica serves a; add one under replicas [unservable]"],
    ),
]
