// Opens a notebook in JupyterLab (and runs all of it), or an application of marimo's, and looks at the view that it
// draws: drawn, hovered, selected, searched, zoomed, moved, by pointer and by keyboard.
//
// node notebooks.mjs jupyterlab|marimo URL PICTURE CHROMIUM     (playwright-core must be found: NODE_PATH)
// Prints what it saw as one line of JSON, and writes a screenshot of the view with a buffer under the pointer.

import { createRequire } from "node:module";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const [host, url, picture, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync"] });
const page = await browser.newPage({ viewport: { width: 1180, height: 1500 } });
const seen = { errors: [] };
page.on("pageerror", (error) => seen.errors.push(String(error)));
page.on("console", (line) => { if (line.type() === "error" && /memplan|anywidget/i.test(line.text())) seen.errors.push(line.text()); });

await page.goto(url, { waitUntil: "domcontentloaded" });
if (host === "jupyterlab") {
  await page.locator(".jp-Notebook .jp-CodeCell").first().waitFor({ timeout: 90_000 });
  await page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').waitFor({ timeout: 90_000 }); // the kernel is up
  await page.getByRole("button", { name: "No", exact: true }).click({ timeout: 5_000 }).catch(() => {}); // news
  await page.keyboard.press("Control+b"); // the file browser gives its room to the notebook
  await page.getByRole("menuitem", { name: "Run", exact: true }).click();
  await page.getByRole("menuitem", { name: "Run All Cells", exact: true }).click();
}
const view = page.locator(".memplan").first(), canvas = view.locator("canvas");
await canvas.waitFor({ timeout: 120_000 });
await canvas.scrollIntoViewIfNeeded();
await page.waitForTimeout(500);

// what is on the canvas: how many colours, and a sum that changes where the picture does
const drawn = () => canvas.evaluate((c) => {
  const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data, found = new Set();
  let sum = 0;
  for (let k = 0; k < data.length; k += 4) {
    found.add(`${data[k]},${data[k + 1]},${data[k + 2]}`);
    sum = (sum * 31 + data[k] + 3 * data[k + 1] + 7 * data[k + 2]) % 2147483647;
  }
  return { colours: found.size, sum };
});
const after = async (action) => { await action(); await page.waitForTimeout(300); return drawn(); };
seen.label = await canvas.getAttribute("aria-label");
seen.whole = await drawn();
const box = await canvas.boundingBox(), middle = [box.x + box.width / 2, box.y + box.height / 2];
for (let y = 0.35; y < 0.95 && !seen.tip; y += 0.04) { // down the middle, until the pointer is over a buffer
  await page.mouse.move(middle[0], box.y + box.height * y);
  await page.waitForTimeout(60);
  const tip = await view.locator(".tip").innerText();
  if (await view.locator(".tip").isVisible() && /FX node/.test(tip)) {
    seen.tip = tip;
    await page.mouse.down(); await page.mouse.up();
    await page.waitForTimeout(100);
    seen.detail = await view.locator("dl").first().innerText();
    await page.screenshot({ path: picture });
  }
}
seen.zoomed = await after(async () => { await page.mouse.move(...middle); await page.mouse.wheel(0, -400); });
seen.moved = await after(async () => {
  await page.mouse.down(); await page.mouse.move(middle[0] + 80, middle[1] + 40, { steps: 4 }); await page.mouse.up();
});
await canvas.focus();
seen.peak = await after(() => page.keyboard.press("p"));
await page.keyboard.press("Escape"); await page.keyboard.press("]");
await page.waitForTimeout(100);
seen.largest = await view.locator("dl").first().innerText();
seen.back = await after(async () => { await page.keyboard.press("Escape"); await page.keyboard.press("0"); });
seen.searched = await after(() => view.locator("input[type=search]").fill("gelu"));
seen.cleared = await after(() => view.locator("input[type=search]").fill(""));
seen.coloured = await after(() => view.locator("select").selectOption("dtype"));
seen.views = await page.locator(".memplan canvas").count();
console.log(JSON.stringify(seen));
await browser.close();
