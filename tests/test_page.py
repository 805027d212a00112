"""The page and the picture that `inspect` writes, as a browser shows them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from ndtrain.console.inspect import inspect_text
from ndtrain.console.mesh_svg import mesh_svg
from ndtrain.console.page import page_html
from ndtrain.console.plan import plan_report
from ndtrain.hf.model import meta_model
from ndtrain.mesh import MeshSizes
from ndtrain.plan import Plan, make_plan
from ndtrain.recipe import load_recipe
from ndtrain.train import sizes_for
from tests import tiny

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

SVG = "{http://www.w3.org/2000/svg}"
# Even and uneven cuts, packed weights, experts: name -> (model, its config, mesh, ranks per node).
PLANS: dict[str, tuple[str, dict[str, Any], dict[str, int], int]] = {
    "8": ("llama", {}, {"dp_shard": 4, "tp": 2}, 8),
    "uneven": ("phi3", {"intermediate_size": 100}, {"dp_shard": 3, "tp": 2}, 4),
    "64": ("qwen3_moe", {"num_experts": 16}, {"dp_replicate": 2, "dp_shard": 4, "cp": 2, "tp": 4, "ep": 16}, 8),
    "1024": ("llama", {"hidden_size": 512, "num_hidden_layers": 3}, {"dp_shard": 256, "tp": 4}, 8),
}


def planned(folder: Path, case: str) -> tuple[Plan, dict[str, Any], int]:
    kind, config, mesh, on_node = PLANS[case]
    path = tiny.recipe_file(
        folder / "recipe.toml",
        model={"type": kind, "init": "random", "config": {**tiny.CONFIGS[kind], **config}},
        corpus=folder,
        run_dir=folder / "run",
        mesh=mesh,
        batch_ranks=mesh.get("dp_replicate", 1) * mesh["dp_shard"],
    )
    recipe = load_recipe(path)
    ranks = mesh.get("dp_replicate", 1) * mesh["dp_shard"] * mesh.get("cp", 1) * mesh["tp"]
    plan = make_plan(meta_model(recipe), sizes_for(recipe, ranks), recipe)
    return plan, plan_report(plan, recipe, rank=1, ranks_per_node=on_node), on_node


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


@pytest.mark.parametrize(
    ("sizes", "on_node"), [(MeshSizes(), 8), (MeshSizes(dp_shard=3, tp=2), 4), (MeshSizes(dp_shard=2048, tp=8), 8)]
)
def test_the_picture_draws_every_rank_once_inside_its_node(sizes: MeshSizes, on_node: int) -> None:
    picture = ElementTree.fromstring(mesh_svg(sizes, on_node))
    frames = [r for r in picture.iter(f"{SVG}rect") if r.get("class") == "node"]
    ranks = [r for r in picture.iter(f"{SVG}rect") if r.get("class") == "rank"]
    assert [int(r.attrib["data-rank"]) for r in ranks] == list(range(sizes.world_size))
    assert len(frames) == -(-sizes.world_size // on_node)
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    corners = set()
    for number, rank in enumerate(ranks):
        frame = frames[number // on_node]
        for at, extent, page in (("x", "width", width), ("y", "height", height)):
            low, high = float(rank.attrib[at]), float(rank.attrib[at]) + float(rank.attrib[extent])
            assert float(frame.attrib[at]) < low and high < float(frame.attrib[at]) + float(frame.attrib[extent])
            assert low >= 0 and high <= page
        corners.add((rank.attrib["x"], rank.attrib["y"]))
    assert len(corners) == sizes.world_size
    assert len({r.attrib["fill"] for r in ranks}) == sizes.tp


def test_the_page_loads_nothing_and_escapes_its_text(tmp_path: Path) -> None:
    plan, report, on_node = planned(tmp_path, "8")
    page = page_html(plan, {**report, "notes": ["</script><script>alert(1)</script>"]}, on_node)
    assert not re.search(r"\b(src|href)\s*=|url\(|@import|fetch\(", page)
    assert re.findall(r"https?://[^\s\"']*", page.replace("http://www.w3.org/2000/svg", "")) == []
    assert data_of(page)["notes"][-1] == "</script><script>alert(1)</script>" and page.count("</script>") == 2


def test_inspect_writes_the_page_with_a_step_and_the_picture(tmp_path: Path) -> None:
    planned(tmp_path, "8")
    page, picture = tmp_path / "plan.html", tmp_path / "mesh.svg"
    recipe = load_recipe(tmp_path / "recipe.toml")
    text = inspect_text(recipe, world_size=8, dry_run=True, device="h100", html=page, svg=picture)
    step = data_of(page.read_text())["step"]
    assert step["roofline"]["device"] == "h100" and step["collectives"] and step["peak"]["bytes"] > 0
    assert "An estimate for h100" in text
    assert ElementTree.fromstring(picture.read_text()).attrib["aria-label"].startswith("8 ranks: dp_shard 4 x tp 2.")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver on PATH")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield opened
    finally:
        opened.quit()


def shown(browser: Chrome, folder: Path, case: str) -> Plan:
    plan, report, on_node = planned(folder, case)
    (folder / "page.html").write_text(page_html(plan, report, on_node))
    browser.get((folder / "page.html").as_uri())
    assert browser.get_log("browser") == []
    return plan


@pytest.mark.parametrize("case", PLANS)
def test_the_page_agrees_with_the_plan_on_every_rank(browser: Chrome, tmp_path: Path, case: str) -> None:
    plan = shown(browser, tmp_path, case)
    sizes = plan.sizes
    found = browser.execute_script(
        "return squares.map((_, rank) => [elementsOn(rank, true), data.exchanging.map(a => group(a, rank)),"
        " data.units.flatMap(u => u.params.map(p => shapeOn(p, rank)))])"
    )
    names = browser.execute_script("return data.units.flatMap(u => u.params.map(p => u.title + ' ' + p.name))")
    assert len(found) == sizes.world_size
    folded = [param for param in plan.params if not re.search(r"\.[1-9]\d*\.", param.fqn)]
    assert len(names) == len(folded)
    for rank in range(0, sizes.world_size, max(1, sizes.world_size // 64)):
        elements, groups, shapes = found[rank]
        assert elements == plan.rank_numel(rank)
        assert groups == [list(sizes.group(axis, rank)) for axis in sizes.axes]
        assert sorted(shapes) == sorted(list(param.local_shape(sizes, rank)) for param in folded)


def test_ranks_can_be_chosen_with_mouse_and_keyboard(browser: Chrome, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    plan = shown(browser, tmp_path, "64")
    about = browser.find_element(By.ID, "about")
    first = browser.find_element(By.CSS_SELECTOR, '[data-rank="37"]')
    assert about.text.startswith("Rank 1\n")
    ActionChains(browser).move_to_element(first).perform()
    assert about.text.startswith("Rank 37\nnode\n4\n") and f"{plan.rank_numel(37):,}" in about.text
    outlined = browser.find_elements(By.CSS_SELECTOR, ".rank.beside")
    assert [int(r.get_attribute("data-rank") or -1) for r in outlined] == list(plan.sizes.group("tp", 37))
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert about.text.startswith("Rank 1\n")

    first.click()
    layers = browser.find_element(By.ID, "layers-rank")
    assert layers.text == "37"
    for key, rank in ((Keys.ARROW_LEFT, 36), (Keys.ARROW_UP, 12), (Keys.END, 63), (Keys.HOME, 0)):
        browser.switch_to.active_element.send_keys(key)
        assert layers.text == str(rank) and about.text.startswith(f"Rank {rank}\n")
        assert browser.switch_to.active_element.get_attribute("aria-label") == f"rank {rank}, node {rank // 8}"

    # Tab moves from the ranks to the layers, and Enter opens one.
    browser.switch_to.active_element.send_keys(Keys.TAB)
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    opened = browser.find_element(By.CSS_SELECTOR, "details[open]")
    param = plan.params[0]
    local = param.local_shape(plan.sizes, 0)
    # A browser tells the page of an opened layer a moment later.
    WebDriverWait(browser, 10).until(lambda _: f"{local[0]} × {local[1]}" in opened.text)  # noqa: RUF001
    assert "dim 0: 0:" in opened.text
    assert len(opened.find_elements(By.CSS_SELECTOR, ".drawing .held")) >= 1
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_legible_in_light_and_dark_mode(browser: Chrome, tmp_path: Path, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    shown(browser, tmp_path, "8")
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    low, background, seen = browser.execute_script(
        """
        const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
        const light = colour => rgb(colour).map(c => linear(c / 255))
          .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
        const contrast = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        const behind = node => { const c = getComputedStyle(node).backgroundColor;
          return /, 0\\)$/.test(c) ? behind(node.parentElement) : c };
        const found = []; let seen = 0;
        for (const node of document.querySelectorAll("h1,h2,h3,p,dt,dd,td,th,code,summary span,li,.line,.number")) {
          const style = getComputedStyle(node), text = node.closest("svg") ? style.fill : style.color;
          const on = node.matches(".number") ? node.previousElementSibling.getAttribute("fill") : behind(node);
          const hex = on.startsWith("#") ? `rgb(${[1, 3, 5].map(i => parseInt(on.slice(i, i + 2), 16))})` : on;
          const ratio = contrast(light(text), light(hex));
          seen += 1;
          if (ratio < 4.5) found.push([node.outerHTML, ratio]);
        }
        return [found, light(behind(document.body)), seen];
        """
    )
    assert low == [] and seen > 100  # WCAG 2.2, 1.4.3
    assert (background > 0.5) == (scheme == "light")


# Elements wider than the page or than the box around them, boxes that hide a part of a table or of the mesh, bars (the
# tracks) and their parts that are too small to see, and how many bars there are.
MEASURE = """
document.querySelectorAll("details").forEach(d => d.open = true);
showLayers();
const wide = [...document.body.querySelectorAll("*")].filter(node => !node.closest("thead, .legend, style, script"))
  .map(node => [node, node.getBoundingClientRect()])
  .filter(([_, r]) => r.width && (r.right > innerWidth + 1 || r.left < -1)).map(([node]) => node)
  .filter(node => !node.closest(".scroll") || node.matches(".scroll"));
const box = document.getElementById("mesh"), squares_ = [...document.querySelectorAll(".rank")];
const bars = [...document.querySelectorAll(".bar")], parts = [...document.querySelectorAll(".bar i:not(.limit)")];
return {
  page: document.scrollingElement.scrollWidth, viewport: innerWidth, wide: wide.map(node => node.outerHTML),
  hidden: [...document.querySelectorAll(".scroll, .mesh")].filter(n => n.scrollWidth > n.clientWidth + 1).length,
  mesh: box.scrollWidth <= box.clientWidth + 1, rank: Math.min(...squares_.map(s => s.getBoundingClientRect().width)),
  bar: Math.min(...bars.map(node => node.getBoundingClientRect().width)),
  part: Math.min(...parts.map(node => node.getBoundingClientRect().width)), count: bars.length,
};
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of plans, one with a step that does not fit and all of its bars, one of a single rank that offloads."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for case in ("64", "1024"):
        plan, report, on_node = planned(folder, case)
        found[case] = folder / f"{case}.html"
        found[case].write_text(page_html(plan, report, on_node))
    planned(folder, "8")
    found["step"] = folder / "step.html"
    inspect_text(load_recipe(folder / "recipe.toml"), world_size=8, device="h100,memory=4e5", html=found["step"])
    found["one rank"] = folder / "one.html"
    alone = ["mesh.dp_shard=1", "mesh.tp=1", "fsdp.cpu_offload=true"]
    inspect_text(load_recipe(folder / "recipe.toml", alone), world_size=1, device="h100", html=found["one rank"])
    return found


@pytest.mark.parametrize("width", [400, 800, 1100, 1600])
@pytest.mark.parametrize("case", ["step", "one rank", "64", "1024"])
def test_nothing_is_cut_off_and_no_bar_is_too_small(
    browser: Chrome, pages: dict[str, Path], case: str, width: int
) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get(pages[case].as_uri())
        seen = browser.execute_script(MEASURE)
        assert browser.get_log("browser") == []
        assert ("cpu_offload, host memory: " in browser.execute_script("return document.body.innerText")) == (
            case == "one rank"
        )
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert seen["viewport"] == width and seen["page"] <= width and seen["wide"] == []
    assert seen["mesh"] and seen["rank"] >= 6
    assert seen["bar"] >= 160 and seen["part"] >= 3 and seen["count"] > (10 if case == "step" else 0)
    if width != 800:  # there a table of long names may scroll within its box
        assert seen["hidden"] == 0


def test_nodes_stand_side_by_side_as_there_is_room(browser: Chrome, pages: dict[str, Path]) -> None:
    """And no two ranks on one place; arrow keys follow what is seen."""
    browser.get(pages["64"].as_uri())
    across = []
    for width in (400, 800, 1600):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        places, below = browser.execute_async_script(
            "const done = arguments[0]; requestAnimationFrame(() => setTimeout(() => done([squares.map(s => {"
            "const r = s.getBoundingClientRect(); return [Math.round(r.x), Math.round(r.y)] }),"
            " neighbour(3, 'ArrowDown')]), 50))"
        )
        assert len({tuple(place) for place in places}) == 64
        across.append(len({x for x, _ in places[::8]}))
        assert below == 3 + 8 * across[-1]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert across[0] == 1 and across == sorted(set(across))
