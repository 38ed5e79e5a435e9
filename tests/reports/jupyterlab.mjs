// Opens a notebook in JupyterLab, runs all of it, and looks at the view that it draws: drawn, hovered, selected, searched.
//
// node jupyterlab.mjs URL NOTEBOOK PICTURE CHROMIUM     (playwright-core must be found: NODE_PATH)
// Prints what it saw as one line of JSON, and writes a screenshot of the first view.

import { createRequire } from "node:module";

const { chromium } = createRequire(import.meta.url)("playwright-core");
const [url, notebook, picture, executablePath] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage({ viewport: { width: 1180, height: 1500 } });
const seen = { errors: [] };
page.on("pageerror", (error) => seen.errors.push(String(error)));
page.on("console", (line) => { if (line.type() === "error" && /memplan|anywidget/i.test(line.text())) seen.errors.push(line.text()); });

await page.goto(`${url.replace(/\/(lab)?$/, "")}/lab/tree/${notebook}?reset`, { waitUntil: "domcontentloaded" });
await page.locator(".jp-Notebook .jp-CodeCell").first().waitFor({ timeout: 90_000 });
await page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').waitFor({ timeout: 90_000 }); // the kernel is up
await page.getByRole("button", { name: "No", exact: true }).click({ timeout: 5_000 }).catch(() => {}); // news
await page.keyboard.press("Control+b"); // the file browser gives its room to the notebook
await page.getByRole("menuitem", { name: "Run", exact: true }).click();
await page.getByRole("menuitem", { name: "Run All Cells", exact: true }).click();
const view = page.locator(".memplan").first(), canvas = view.locator("canvas");
await canvas.waitFor({ timeout: 180_000 });
await canvas.scrollIntoViewIfNeeded();
await page.waitForTimeout(500);

// how many colours the canvas has
const colours = () => canvas.evaluate((c) => {
  const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data, found = new Set();
  for (let k = 0; k < data.length; k += 4) found.add(`${data[k]},${data[k + 1]},${data[k + 2]}`);
  return found.size;
});
seen.label = await canvas.getAttribute("aria-label");
seen.colours = await colours();
const box = await canvas.boundingBox();
for (let y = 0.35; y < 0.95 && !seen.tip; y += 0.07) { // down the middle, until the pointer is over a buffer
  await page.mouse.move(box.x + box.width / 2, box.y + box.height * y);
  await page.waitForTimeout(60);
  const tip = await view.locator(".tip").innerText();
  if (await view.locator(".tip").isVisible() && /FX node/.test(tip)) {
    seen.tip = tip;
    await page.mouse.down(); await page.mouse.up();
    await page.waitForTimeout(100);
    seen.detail = await view.locator("dl").first().innerText();
    if (picture) await page.locator(".jp-NotebookPanel-notebook").screenshot({ path: picture });
  }
}
await canvas.focus();
await page.keyboard.press("Escape"); await page.keyboard.press("]");
await page.waitForTimeout(100);
seen.largest = await view.locator("dl").first().innerText();
await view.locator("input[type=search]").fill("gelu");
await page.waitForTimeout(200);
seen.found = await view.innerText();
await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2);
await page.mouse.wheel(0, -400);
await page.waitForTimeout(300);
seen.afterZoom = await colours();
console.log(JSON.stringify(seen));
await browser.close();
