"""Who gets in: every route, method, spelling and key, and what SGLang is told its own way."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from helpers.reference import TINY_FLAGS
from starlette.routing import Mount

from ead_server.asgi import all_routes
from ead_server.edge.headers import ONCE, is_loopback, refused_headers
from ead_server.edge.keys import ADMIN_ROUTES, OPEN, sglang_admin_paths
from ead_server.launch import flags
from ead_server.launch.process import ServerProcess
from ead_server.settings import Settings

KEY = "the-key-of-a-config-file"
SITE = "https://notebook.example"


@pytest.fixture(scope="module")
def adopted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that is given its API key SGLang's own way."""
    folder = tmp_path_factory.mktemp("adopted")
    (folder / "config.yaml").write_text(f"api-key: {KEY}\n")
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, "--cors-origin", SITE]
    arguments += ["--config", str(folder / "config.yaml")]
    with ServerProcess(arguments, folder / "server.log") as process:
        process.wait_until_ready()
        yield process


def live_routes() -> list[tuple[str, str]]:
    """(method, path) of everything on SGLang's app and ours, and of what is mounted on it."""
    from sglang.srt.entrypoints.http_server import app

    import ead_server.annealing.routes
    import ead_server.edge.health
    import ead_server.rollouts.routes
    import ead_server.weights.routes

    ours = (
        ead_server.annealing.routes,
        ead_server.edge.health,
        ead_server.rollouts.routes,
        ead_server.weights.routes,
    )
    found = [*all_routes(app.routes), *(r for module in ours for r in module.router.routes)]
    table = {(m, r.path) for r in found if isinstance(r, APIRoute) for m in r.methods}
    mounted = {("GET", r.path) for r in app.routes if isinstance(r, Mount)}
    docs = {("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/redoc")}
    return sorted(table | mounted | docs | {("GET", "/metrics"), ("GET", "/metrics/x")})


def spellings(path: str) -> list[str]:
    """As a client may write the same path, or nearly."""
    concrete = path.replace("{model:path}", "m").replace("{response_id}", "r")
    return [
        concrete,
        concrete + "/",
        "/" + concrete,
        concrete.replace("e", "%65"),
        concrete + "?x=1",
        concrete.upper(),
        concrete + "/..",
        concrete + ";x",
    ]


def test_every_route_asks_for_a_key(adopted: ServerProcess) -> None:
    """Generated from the live routes, so a new one without a rule fails here. An answer without a
    key is 401 or 403, unless the path is one of the few that are open, or of no route at all."""
    from sglang.srt.entrypoints.http_server import app

    routes = live_routes()
    assert len(routes) > 80
    marked = set(sglang_admin_paths(app.routes))
    assert len(marked) > 20
    open_to_all = 0
    with httpx.Client(base_url=adopted.url, timeout=60) as http:
        for method, path in routes:
            for spelling in spellings(path):
                for other in {method, "OPTIONS", "HEAD", "DELETE", "PATCH", "POST", "GET"}:
                    for credential in (None, "Bearer wrong", "Basic x", "Bearer"):
                        headers = {} if credential is None else {"authorization": credential}
                        status = http.request(
                            other, adopted.url + spelling, headers=headers
                        ).status_code
                        plain = spelling.partition("?")[0].replace("%65", "e")
                        if plain in OPEN and other in ("GET", "HEAD"):
                            open_to_all += 1
                            assert status in (200, 405, 503), (other, spelling, status)
                        else:
                            assert status in (401, 403), (other, spelling, credential, status)
                if credential_independent(path):
                    break
        assert open_to_all > 20
        # and the API key does not open what is the admin's
        key = {"authorization": f"Bearer {KEY}"}
        for method, path in routes:
            if (method, path) in ADMIN_ROUTES or path in marked:
                assert http.request(method, path, headers=key).status_code == 401, path
        assert http.get("/v1/models", headers=key).status_code == 200


def credential_independent(path: str) -> bool:
    """Spellings of all are tried for a few; of the others, the path itself alone."""
    return path not in ("/metrics", "/generate", "/v1/annealing", "/flush_cache", "/health")


def test_sglang_forgets_the_key_that_it_was_given(adopted: ServerProcess) -> None:
    info = httpx.get(adopted.url + "/server_info", headers={"authorization": f"Bearer {KEY}"})
    assert info.status_code == 200
    assert KEY not in info.text
    assert KEY not in adopted.log.read_text(errors="replace")


def test_two_values_of_a_header_are_refused(adopted: ServerProcess) -> None:
    """Readers would take different ones: the guard the last, SGLang perhaps the first."""
    good = ("authorization", f"Bearer {KEY}")
    for headers in (
        [good, ("authorization", "Bearer wrong")],
        [("authorization", "Bearer wrong"), good],
        [good, ("content-type", "application/json"), ("content-type", "multipart/form-data")],
        [good, ("idempotency-key", "a"), ("idempotency-key", "b")],
    ):
        answer = httpx.post(adopted.url + "/v1/rollouts", headers=headers, content=b"{}")
        assert answer.status_code == 400, headers
        assert "must be sent once" in answer.json()["error"]["message"]
    body = b'{"prompts": ["x"], "sampling_params": {"max_new_tokens": 1}}'
    headers = [good, ("content-type", "multipart/form-data; boundary=x")]
    answer = httpx.post(adopted.url + "/v1/rollouts", headers=headers, content=body)
    assert answer.status_code == 415


def test_a_preflight_passes_and_makes_no_call(adopted: ServerProcess) -> None:
    """A browser asks without a key. Its body is not read: it may promise 30 MB and never come."""
    asks = {"origin": SITE, "access-control-request-method": "POST"}
    answer = httpx.options(adopted.url + "/v1/chat/completions", headers=asks)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == SITE
    other = {**asks, "origin": "https://evil.example"}
    answer = httpx.options(adopted.url + "/v1/chat/completions", headers=other)
    assert "access-control-allow-origin" not in answer.headers
    address = adopted.url.removeprefix("http://")
    head = f"OPTIONS /generate HTTP/1.1\r\nhost: {address}\r\ncontent-length: 30000000\r\n\r\n"
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_refusals_can_be_read_by_the_pages_that_may_call(adopted: ServerProcess) -> None:
    """Without the header a browser shows a network error in place of what is wrong."""
    for headers in ({}, {"authorization": f"Bearer {KEY}"}):
        answer = httpx.post(
            adopted.url + "/v1/chat/completions",
            headers={"origin": SITE, **headers},
            json={"model": "m", "messages": [], "annealing": {"tau_max": -1}},
        )
        assert answer.status_code in (400, 401)
        assert answer.headers["access-control-allow-origin"] == SITE


# --- the browser of who has no key ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:30000", None, None),
        ("localhost:30000", None, None),
        ("[::1]:30000", "http://[::1]:30000", None),
        ("localhost:30000", "http://localhost:30000", None),
        ("localhost:30000", "http://evil.example", 403),
        ("localhost:30000", "null", 403),
        ("localhost:30000", "http://localhost:8888", 403),  # another program's pages
        ("localhost:30000", SITE, None),
        ("evil.example", "http://evil.example", 403),  # a name that was made to mean 127.0.0.1
        ("evil.example:30000", None, 403),
        ("localhost.evil.example", None, 403),
        ("127.0.0.1.evil.example", None, 403),
        ("notebook.example", SITE, None),
    ],
)
def test_pages_of_other_sites_do_not_get_in(
    host: str, origin: str | None, status: int | None
) -> None:
    """On loopback without a key, where any page that the user visits could otherwise generate."""
    settings = Settings.model_validate({"on_loopback": True, "cors_origins": (SITE,)})
    headers = [(b"host", host.encode())]
    headers += [] if origin is None else [(b"origin", origin.encode())]
    scope = {"headers": headers, "query_string": b"", "method": "POST"}
    refusal = refused_headers(settings, "/generate", scope, has_key=False)
    assert (refusal.status if refusal else None) == status
    assert refused_headers(settings, "/generate", scope, has_key=True) is None


def test_loopback_is_told_by_the_address() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "", "10.0.0.1", "localhost.x", "::", "127.x")))


def test_each_header_that_decides_is_read_once() -> None:
    for name in ONCE:
        scope: dict[str, Any] = {"headers": [(name, b"a"), (name.title(), b"b")]}
        scope["query_string"] = b""
        refusal = refused_headers(Settings.model_validate({}), "/x", scope, has_key=True)
        assert refusal is not None
        assert refusal.field == name.decode()
        scope["headers"] = [(name, b"a"), (name, b"a")]
        assert refused_headers(Settings.model_validate({}), "/x", scope, has_key=True) is None


# --- SGLang's own flags, files and environment ----------------------------------------------------


def test_flags_cut_short_and_files_are_as_good_as_whole_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("api-key: K\nmem-fraction-static: 0.5\n")
    assert flags.expanded(["--api-k", "X", "--model-pat=m"]) == [
        *("--api-key", "X"),
        "--model-path=m",
    ]
    for given in (["--config", str(file)], [f"--config={file}"], ["--conf", str(file)]):
        expanded = flags.expanded(given)
        assert expanded[expanded.index("--api-key") + 1] == "K"
        assert "--mem-fraction-static" in expanded  # so that our own default does not win
    with pytest.raises(SystemExit):
        flags.expanded(["--config", str(tmp_path / "none.yaml")])


class Given:
    """SGLang's ServerArgs, as far as they matter here."""

    def __init__(self, **fields: Any) -> None:
        self.api_key = self.admin_api_key = None
        self._launch_command = "sglang --api-key THEIRS"
        self.__dict__.update(fields)


def test_keys_of_sglang_s_own_are_adopted() -> None:
    args = Given(api_key="THEIRS", admin_api_key="ADMIN")
    settings = flags.with_keys_of(Settings.model_validate({}), args)
    assert (settings.api_key, settings.admin_api_key) == ("THEIRS", "ADMIN")
    assert args.api_key is None
    assert args.admin_api_key not in (None, "ADMIN")
    assert "THEIRS" not in args._launch_command
    same = flags.with_keys_of(settings, Given(api_key="THEIRS"))
    assert same.api_key == "THEIRS"
    with pytest.raises(SystemExit):
        flags.with_keys_of(settings, Given(api_key="another"))


@pytest.mark.parametrize("name", flags.REFUSED)
def test_what_opens_another_way_in_is_refused(name: str) -> None:
    from sglang.srt.server_args import ServerArgs, record_fields

    assert name in {field.name for field in record_fields(ServerArgs)}
    reason = flags.refused(Given(**{name: True}), {})
    assert reason is not None
    assert reason.startswith(f"--{name.replace('_', '-')}: ")
    assert flags.refused(Given(**{name: None}), {}) is None


@pytest.mark.parametrize("name", flags.REFUSED_VARIABLES)
def test_so_is_a_variable_that_does(name: str) -> None:
    for value in ("1", "true", "reuse", "50051"):
        reason = flags.refused(Given(), {name: value})
        assert reason is not None
        assert reason.startswith(f"{name}: ")
    for value in ("", "0", "false"):
        assert flags.refused(Given(), {name: value}) is None
