"""A page of another origin in a browser on this machine, which reaches every server on the loopback
interface, reads nothing of `make up` or of a run's temporary server, and makes nothing there."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect, sync_playwright
from prefect_api import PrefectApi, wait_for
from workshop import PROJECT, Workshop

pytestmark = [pytest.mark.slow, pytest.mark.security, pytest.mark.timeout(900)]

ELSEWHERE = "elsewhere.test"
"""A name that leads to this machine, as after DNS rebinding."""

# Each attempt returns the text that the page could read, or "" where the browser kept it away.
# A simple request, which no browser asks the server's leave for, may be made without reading.
ATTACK = """
async ([api, login]) => {
  const read = async (path, options) => {
    try {
      let answer = await fetch(api + path, options);
      // SQLite is locked by another writer for a while.
      for (let tries = 0; answer.status == 503 && tries < 40; tries++) {
        await new Promise(done => setTimeout(done, 500));
        answer = await fetch(api + path, options);
      }
      return answer.ok ? await answer.text() : "";
    } catch { return ""; }
  };
  const flow = JSON.stringify({name: "made-by-a-page"});
  const blocks = JSON.stringify({include_secrets: true});
  const variable = JSON.stringify({name: "made_by_a_page", value: "x"});
  const asJson = {"Content-Type": "application/json"};
  const headers = login ? {...asJson, Authorization: "Basic " + btoa(login)} : asJson;
  const found = [
    await read("/block_documents/filter", {method: "POST", headers, body: blocks}),
    await read("/block_documents/filter", {method: "POST", body: blocks}),
    await read("/block_documents/filter", {method: "POST", body: new Blob([blocks])}),
    await read("/admin/settings", {headers}),
    await read("/admin/settings", {}),
  ];
  const make = async (path, values) => {
    const body = JSON.stringify({name: "made-by-a-page", ...values});
    const answer = await read(path, {method: "POST", headers, body});
    found.push(answer);
    return answer ? JSON.parse(answer).id : "00000000-0000-4000-8000-000000000000";
  };
  const flow_id = await make("/flows/", {});
  const deployment_id = await make("/deployments/", {flow_id});
  await make(`/deployments/${deployment_id}/create_flow_run`, {});
  for (const [path, text] of [["/flows/", flow], ["/variables/", variable]]) {
    for (const body of [text, new Blob([text]), new Blob([text], {type: "text/plain"})]) {
      await read(path, {method: "POST", mode: "no-cors", body, credentials: "include"});
    }
    for (const encoding of ["text/plain", "application/x-www-form-urlencoded"]) {
      const frame = document.createElement("iframe");
      frame.name = "answer";
      const form = document.createElement("form");
      Object.assign(form, {method: "POST", action: api + path, enctype: encoding});
      form.target = "answer";
      const field = document.createElement("input");
      [field.name, field.value] = [text.slice(0, -1) + ', "x": "', '"}'];
      form.append(field);
      document.body.append(frame, form);
      const answered = new Promise(done => frame.addEventListener("load", done));
      form.submit();
      await answered;
      frame.remove();
    }
  }
  const event = JSON.stringify({
    event: "made-by-a-page", resource: {"prefect.resource.id": "made-by-a-page"},
    occurred: new Date().toISOString(), id: crypto.randomUUID ? crypto.randomUUID()
      : "11111111-1111-4111-8111-111111111111",
  });
  for (const protocols of [[], ["prefect"]]) {
    for (const path of ["/events/in", "/events/out"]) {
      found.push(await new Promise(done => {
        const socket = new WebSocket(api.replace("http", "ws") + path, protocols);
        socket.onopen = () => {
          if (protocols.length) socket.send(JSON.stringify({type: "auth", token: login}));
          else { socket.send(event); setTimeout(() => socket.close(), 1000); }
        };
        socket.onmessage = message => { done(message.data); socket.send(event); socket.close(); };
        socket.onclose = () => done("");
      }));
    }
  }
  return found.filter(text => text);
}
"""

RUN = """
import os, sys
import flows
from prefect import flow, get_client

@flow(name="the-run")
def the_run():
    with get_client(sync_client=True) as client:
        print(client.api_url, os.environ["PREFECT_API_AUTH_STRING"], flush=True)
    sys.stdin.readline()

the_run()
"""


class EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """The URL of a page of another origin."""
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{ELSEWHERE}:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium that reaches nothing but this machine."""
    rules = f"MAP {ELSEWHERE} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
    arguments = ["--no-sandbox", "--disable-gpu", f"--host-resolver-rules={rules}"]
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        assert chromium, "this test needs Chromium: apt-get install chromium"
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """What `make up` starts, with a secret on the server."""
    workshop = Workshop(tmp_path_factory.mktemp("up"))
    workshop.environment["HF_TOKEN"] = "planted-token-4Wq8Zs2Nv6"
    try:
        done = local(workshop, "up")
        assert done.returncode == 0, done.stdout + done.stderr
        login = workshop.log_in()
        # As `make up` says.
        assert str(workshop.folder / "run" / "password") in done.stdout
        assert login not in done.stdout + done.stderr
        yield workshop
        down = local(workshop, "down")
        assert down.returncode == 0, down.stderr
    finally:
        workshop.close()


def local(workshop: Workshop, command: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(PROJECT / "deployments" / "local.py"), command]
    return subprocess.run(
        script, env=workshop.environment, capture_output=True, text=True, timeout=300
    )


def attack(browser: Browser, page_url: str, api: str, login: str = "") -> list[str]:
    """What a page at `page_url` reads of the API after it has tried all."""
    page = browser.new_page()
    try:
        page.goto(page_url)
        read: list[str] = page.evaluate(ATTACK, [api, login])
        return read
    finally:
        page.context.close()


def made(server: PrefectApi) -> list[str]:
    """The kinds of things that a page has made."""
    kinds = ["flows", "deployments", "flow_runs", "variables"]
    found = {kind: server.ask(f"/{kind}/filter") for kind in kinds}
    found["events"] = server.ask("/events/filter", filter={"event": {"name": ["made-by-a-page"]}})
    return [kind for kind, things in found.items() if re.search("made.by.a.page", str(things))]


def test_a_page_elsewhere_reads_and_makes_nothing(
    workshop: Workshop, browser: Browser, elsewhere: str
) -> None:
    assert attack(browser, elsewhere, f"{workshop.url}/api") == []
    assert made(workshop) == []


def test_a_page_whose_name_is_led_to_this_machine_reads_and_makes_nothing(
    workshop: Workshop, browser: Browser
) -> None:
    """DNS rebinding: the page is of the server's own origin, but it has no password."""
    rebound = f"http://{ELSEWHERE}:{workshop.port}"
    assert attack(browser, f"{rebound}/api/health", f"{rebound}/api") == []
    assert made(workshop) == []


def test_a_wrong_password_or_none_is_refused(workshop: Workshop) -> None:
    for auth in (None, ("admin", "wrong"), ("admin", "")):
        answer = httpx.post(f"{workshop.url}/api/flows/filter", json={}, auth=auth)
        assert answer.status_code == 401
    assert (workshop.folder / "run" / "password").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_people_log_in_to_the_ui(workshop: Workshop, browser: Browser, host: str) -> None:
    login = workshop.environment["PREFECT_API_AUTH_STRING"]
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"http://{host}:{workshop.port}/")
    page.get_by_placeholder("admin:pass").fill(login)
    page.get_by_role("button", name="Login").click()
    expect(page).to_have_url(re.compile("/dashboard"))
    page.goto(f"http://{host}:{workshop.port}/v2/work-pools")
    expect(page.get_by_text("gpu-pool").first).to_be_visible(timeout=60_000)
    page.context.close()


def test_the_same_page_with_the_password_reads_and_makes(
    workshop: Workshop, browser: Browser
) -> None:
    """What the attempts above would find if a server let them in."""
    login = workshop.environment["PREFECT_API_AUTH_STRING"]
    read = attack(browser, f"{workshop.url}/api/health", f"{workshop.url}/api", login)
    assert any("planted-token-4Wq8Zs2Nv6" in text for text in read)
    assert {"flows", "deployments", "flow_runs"} <= set(made(workshop))


def test_a_worker_takes_a_run_that_is_started_with_the_password(workshop: Workshop) -> None:
    parameters = {"model_name": "no-such-model", "input_uri": "no-such-file.csv"}
    done = workshop.deployment_run("batch-inference/cpu", parameters)
    run = workshop.newest_run("batch-inference")
    assert done.returncode == 1, done.stdout + done.stderr
    assert run["state_name"] == "Failed"
    assert workshop.worker_that_ran(run) == ["cpu-pool"]
    del workshop.environment["PREFECT_API_AUTH_STRING"]
    refused = workshop.deployment_run("batch-inference/cpu", parameters)
    assert refused.returncode == 1
    assert "401" in refused.stdout + refused.stderr


@contextmanager
def temporary_server(folder: Path) -> Iterator[PrefectApi]:
    """The server that Prefect starts for a run without one, while the run waits."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "DISTILLERY_"))
    }
    # A profile that names no server changes nothing.
    profile = folder / ".prefect" / "profiles.toml"
    profile.parent.mkdir()
    profile.write_text(
        'active = "mine"\n[profiles.mine]\nPREFECT_SERVER_EPHEMERAL_ENABLED = "true"\n'
    )
    environment = kept | {"HOME": str(folder), "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        assert run.stdin is not None
        url, login = run.stdout.readline().split()
        yield PrefectApi(url.rstrip("/"), login)
        run.stdin.write("\n")
        run.stdin.close()
        assert run.wait(120) == 0


def test_a_page_elsewhere_reads_and_makes_nothing_on_the_temporary_server(
    tmp_path: Path, browser: Browser, elsewhere: str
) -> None:
    with temporary_server(tmp_path) as server:
        url = str(server.api.base_url).rstrip("/")
        assert httpx.post(f"{url}/flows/filter", json={}).status_code == 401
        assert attack(browser, elsewhere, url) == []
        names = wait_for("the run's flow", lambda: server.ask("/flows/filter"))
        assert [flow["name"] for flow in names] == ["the-run"]
        assert made(server) == []
