"""A workshop behind JupyterHub, whose library asks a small server that answers as the hub's API does."""

import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from flexmagic.errors import ClusterError, InputError
from flexmagic.workshop.address import Address
from flexmagic.workshop.allowance import Allowance, Use
from flexmagic.workshop.guests import Guest, Guests
from flexmagic.workshop.link import Link
from flexmagic.workshop.notices import Board
from flexmagic.workshop.serving import Server

pytest.importorskip("jupyterhub", reason="JupyterHub's library is not installed")

from flexmagic.workshop.hub import Hub

SCOPE = "access:services!service=flexmagic"
USERS = {
    "token-of-ann": {"name": "ann", "kind": "user", "scopes": [SCOPE]},
    "another-of-ann": {"name": "ann", "kind": "user", "scopes": [SCOPE]},
    "token-of-ben": {"name": "ben@lab <b>", "kind": "user", "scopes": [SCOPE]},
    "weak-token-of-ben": {"name": "ben@lab <b>", "kind": "user", "scopes": ["users:activity!user=ben"]},
}


class Answers(BaseHTTPRequestHandler):
    """`/hub/api/user` as it is documented: whose token it is, or 403."""

    def do_GET(self):
        user = USERS.get(self.headers.get("Authorization", "").removeprefix("token ").removeprefix("Bearer "))
        right = self.path.partition("?")[0] == "/hub/api/user" and user is not None
        body = json.dumps(user if right else {"status": 403}).encode()
        self.send_response(200 if right else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        pass


@pytest.fixture
def hub(monkeypatch):
    api = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=api.serve_forever, daemon=True).start()
    for name, value in {
        "JUPYTERHUB_API_TOKEN": "of-the-service",
        "JUPYTERHUB_API_URL": f"http://127.0.0.1:{api.server_port}/hub/api",
        "JUPYTERHUB_SERVICE_URL": "http://127.0.0.1:0",
        "JUPYTERHUB_SERVICE_PREFIX": "/services/flexmagic/",
        "JUPYTERHUB_SERVICE_NAME": "flexmagic",
        "JUPYTERHUB_OAUTH_ACCESS_SCOPES": json.dumps(["access:services", SCOPE]),
    }.items():
        monkeypatch.setenv(name, value)
    yield Hub()
    api.shutdown()
    api.server_close()


class Workshop:
    """Of a workshop, its door and its places."""

    is_over = False

    def __init__(self, users):
        def guest(name, token):
            return Guest(name, token, Use(Allowance, lambda: 0.0), 0.0)

        self.guests = Guests(2, guest, lambda: 0.0, open_to_all=False, users=users)
        self.memory = SimpleNamespace(door={}, save=lambda: None)
        self.board = Board()

    def join(self, secret, name):
        guest, seat, token = self.guests.join(secret, name)
        return {"guest": guest.name, "seat": seat, "token": token}

    def ask(self, guest, kind, _given, _frames):
        return {"asked": f"{guest.name} {kind}"}, []

    def refused(self, *_args):
        pass

    def close(self, **_options):
        pass


@pytest.fixture
def url(hub):
    server = Server(Workshop(hub.user), hub.host, hub.port, hub=hub)
    yield f"http://127.0.0.1:{server.port}/services/flexmagic"
    server.close()


def test_users_of_the_hub_have_places_under_their_names(hub, url, monkeypatch):
    def join(token):
        monkeypatch.setenv("JUPYTERHUB_API_TOKEN", token)
        return Link(Address.read(url), "somebody else")

    ann = join("token-of-ann")
    assert ann.facts["guest"] == "ann"
    assert str(ann.address) == url, "nobody sees a token"
    assert join("another-of-ann").facts["guest"] == "ann", "of a server that was started again"
    assert join("token-of-ben").facts["guest"] == "ben%40lab %3Cb%3E"
    for token, why in (("forged", "does not know your token"), ("weak-token-of-ben", f"lacks {SCOPE}")):
        with pytest.raises(ClusterError, match=why):
            join(token)


def test_addresses_of_a_hub_take_its_token_and_no_open_way(monkeypatch):
    monkeypatch.delenv("JUPYTERHUB_API_TOKEN", raising=False)
    with pytest.raises(InputError, match="none of a hub's"):
        Address.read("http://127.0.0.1:8000/services/flexmagic")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "t")
    with pytest.raises(InputError, match="https://"):
        Address.read("http://lab.example/services/flexmagic")
    there = Address.read("https://lab.example/services/flexmagic/")
    assert (there.host, there.port, there.prefix, there.token) == (
        "lab.example",
        443,
        "/services/flexmagic",
        "t",
    )


def test_without_a_hub_it_says_so(monkeypatch):
    monkeypatch.delenv("JUPYTERHUB_SERVICE_URL", raising=False)
    with pytest.raises(ClusterError, match="is not set"):
        Hub()


class Proxy(BaseHTTPRequestHandler):
    """A hub's proxy that has no way yet to the service for so many requests."""

    without, port = 0, 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if Proxy.without:
            Proxy.without -= 1
            self.send_error(404)
            return
        there = http.client.HTTPConnection("127.0.0.1", Proxy.port)
        there.request("POST", self.path, body, dict(self.headers))
        answer = there.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name in ("Content-Type", "Content-Length"):
            self.send_header(name, answer.getheader(name))
        self.end_headers()
        self.wfile.write(body)
        there.close()

    def log_message(self, *_args):
        pass


@pytest.fixture
def proxied(url):
    proxy = HTTPServer(("127.0.0.1", 0), Proxy)
    Proxy.without, Proxy.port = 0, urlsplit(url).port
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}/services/flexmagic"
    proxy.shutdown()
    proxy.server_close()


def test_a_hub_that_starts_is_waited_for_by_who_has_a_place(proxied, monkeypatch):
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "token-of-ann")
    link, said = Link(Address.read(proxied)), []
    link.say = said.append
    assert link.ask("status")[0]["asked"] == "ann status"
    Proxy.without = 3
    assert link.ask("status")[0]["asked"] == "ann status"
    assert Proxy.without == 0
    assert ["started again" in text for text in said] == [True]
    Proxy.without = 1
    with pytest.raises(ClusterError, match=r"reaches no workshop at /services/flexmagic \(HTTP 404\)"):
        Link(Address.read(proxied))


def test_users_are_told_the_hubs_address_and_never_the_services_own(hub, monkeypatch):
    server = Server(Workshop(hub.user), hub.host, hub.port, hub=hub)
    server.close()
    assert server.lines == {"": "%flexcluster join"}
    monkeypatch.setenv("JUPYTERHUB_PUBLIC_URL", "https://lab.example/services/flexmagic/")
    server = Server(Workshop(hub.user), hub.host, hub.port, hub=Hub())
    server.close()
    assert server.lines == {"": "%flexcluster join https://lab.example/services/flexmagic"}


@pytest.mark.parametrize("host", ["0.0.0.0", "lab.example", "10.1.2.3"])  # noqa: S104 - that is what is refused
def test_a_service_where_others_would_hear_tokens_is_refused(hub, monkeypatch, host):
    monkeypatch.setenv("JUPYTERHUB_SERVICE_URL", f"http://{host}:10101")
    with pytest.raises(ClusterError, match=f"at {host}, where others would hear"):
        Hub()
    monkeypatch.setenv("JUPYTERHUB_SERVICE_URL", "http://127.0.0.1:10101")
    assert (Hub().host, Hub().port) == ("127.0.0.1", 10101)
