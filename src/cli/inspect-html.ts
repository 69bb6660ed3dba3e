/** The page of `arl inspect --html`: the row's text with its trained tokens, and its images as the model gets them. */
import type { InspectedImage, InspectedRow } from "../api/inspect-row.js";
import { percent } from "../report/index.js";

/** An image of the row with its pixels as a PNG. */
export interface ShownImage {
	image: InspectedImage;
	png: Uint8Array;
}

const escaped = (text: string) =>
	text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

const STYLE = `body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color-scheme: light dark; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 ui-monospace, monospace; }
.token:nth-child(even) { opacity: .8; }
.trained { background: #2e7d3240; }
figure { margin: .5rem 0; white-space: normal; }
img { max-width: 100%; image-rendering: auto; border: 1px solid #8888; }
figcaption { font: 13px/1.5 system-ui, sans-serif; opacity: .8; }`;

/** The row as a page in one file that needs no network. */
export function inspectHtml(row: InspectedRow, shown: readonly ShownImage[]): string {
	const { location, shape, tokens, targetTokens, texts } = row;
	const images = new Map(shown.map((one) => [one.image.at, one]));
	const body = texts.map(({ at, text, weights }) => {
		const image = images.get(at);
		if (image !== undefined) return figure(image, text);
		const trained = weights.some((weight) => weight > 0) ? " trained" : "";
		return `<span class="token${trained}" title="token ${at}">${escaped(text)}</span>`;
	});
	const summary = `${tokens} tokens of ${shape}, ${targetTokens} trained (${percent(targetTokens / tokens)}, marked)`;
	return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>${escaped(location)}</title>
<style>${STYLE}</style>
<h1>${escaped(location)}</h1>
<p>${escaped(summary)}</p>
<pre>${body.join("")}</pre>
</html>
`;
}

function figure({ image, png }: ShownImage, text: string): string {
	const { original, resized, name } = image;
	const data = Buffer.from(png.buffer, png.byteOffset, png.byteLength).toString("base64");
	const caption = `${text}: ${original.width} x ${original.height} pixels, ${resized.width} x ${resized.height} for the model`;
	return `<figure><img alt="${escaped(name)}" width="${resized.width}" height="${resized.height}" src="data:image/png;base64,${data}"><figcaption>${escaped(caption)}</figcaption></figure>`;
}
