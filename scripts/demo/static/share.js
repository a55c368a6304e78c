// A small drawing as text for a link; a question as a curl command.
//
// Bytes of a drawing: the version; then for each stroke its tool (0 pen, 1 eraser), its number of points, and for each point its x,
// y and width as differences to the point before, in GRIDs of the longer side, as variable-length integers.

const VERSION = 1;
const GRID = 512;
const MAX_POINTS = 20_000;
export const MAX_LINK_CHARACTERS = 8000;
const TOOLS = ["pen", "eraser"];
const LONGEST_INLINE = 100_000; // characters: Linux takes 131,072 in one argument

export class UnreadableLink extends Error {}

export function encodeStrokes(strokes) {
  const bytes = [VERSION];
  const write = (value) => {
    for (; value > 127; value >>>= 7) bytes.push((value & 127) | 128);
    bytes.push(value);
  };
  for (const { tool, points } of strokes) {
    write(TOOLS.indexOf(tool));
    write(points.length);
    let last = [0, 0, 0];
    for (const point of points) {
      const placed = point.map((share) => Math.round(share * GRID));
      placed.forEach((value, axis) => {
        const step = value - last[axis];
        write(step < 0 ? -2 * step - 1 : 2 * step);
      });
      last = placed;
    }
  }
  return btoa(String.fromCharCode(...bytes)).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The opposite. Throws UnreadableLink: whoever made the link may have written anything. */
export function decodeStrokes(text) {
  let bytes;
  try {
    bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (character) => character.charCodeAt(0));
  } catch {
    throw new UnreadableLink("not base64");
  }
  let at = 0;
  const read = () => {
    let value = 0;
    for (let shift = 0; ; shift += 7) {
      if (at >= bytes.length || shift > 21) throw new UnreadableLink("cut off");
      const byte = bytes[at++];
      value |= (byte & 127) << shift;
      if (byte < 128) return value;
    }
  };
  if (text.length > MAX_LINK_CHARACTERS || read() !== VERSION) throw new UnreadableLink("another version");
  const strokes = [];
  let pointCount = 0;
  while (at < bytes.length) {
    const tool = TOOLS[read()];
    const length = read();
    pointCount += length;
    if (!tool || length < 1 || pointCount > MAX_POINTS) throw new UnreadableLink("no strokes");
    const points = [];
    let last = [0, 0, 0];
    for (let index = 0; index < length; index++) {
      last = last.map((value) => {
        const step = read();
        return value + (step & 1 ? -(step + 1) / 2 : step / 2);
      });
      const [x, y, width] = last;
      if (Math.abs(x) > 2 * GRID || Math.abs(y) > 2 * GRID || width < 1 || width > GRID) throw new UnreadableLink("outside");
      points.push(last.map((value) => value / GRID));
    }
    strokes.push({ tool, colour: tool === "pen" ? "#000" : "#fff", points });
  }
  if (!strokes.length) throw new UnreadableLink("empty");
  return strokes;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/**
 * Write the shell command that asks the same.
 * @param settings of the page's own server: { curl: [before the JSON, address] }.
 * @returns { command, file }: the command, and the body that it reads from request.json where that is too long for a command line.
 */
export function curlCommand({ curl: [before, address] }, body) {
  const json = JSON.stringify(body);
  const isLong = json.length > LONGEST_INLINE;
  return { command: `${before} ${isLong ? "@request.json" : quoted(json)} ${address}`, file: isLong ? json : null };
}
