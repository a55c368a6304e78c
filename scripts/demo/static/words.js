// What can go wrong, in plain words. An error has a type: the page's own server's, TorchServe's or the model's.
// `kind` is "wait" where the page tries again by itself, "you" where the person can do something, "broken" where neither helps.

const AGAIN = "The page tries again by itself.";

const STATES = {
  PageGone: { kind: "wait", title: "This page has lost its own server.", text: "Start it again with: make demo. The page then goes on by itself." },
  Starting: { kind: "wait", title: "The model is starting.", text: "That takes about twenty seconds. You can draw already; the answer comes by itself." },
  Unreachable: { kind: "wait", title: "The model's server does not answer.", text: AGAIN, shows: true },
  NoAnswer: { kind: "wait", title: "The model's server takes too long.", text: AGAIN },
  Overloaded: { kind: "wait", title: "The model's server is busy.", text: AGAIN },
  Died: { kind: "wait", title: "A worker of the model's server has ended.", text: "Another one takes its place. " + AGAIN },
  NotLoaded: { kind: "wait", title: "The server does not serve this model yet.", text: "It may still be loading it. " + AGAIN, shows: true },
  TokenRefused: { kind: "wait", title: "The server refuses the token (401).", text: "The key file is read again at every try: put a valid token there. " + AGAIN },
  NoToken: { kind: "wait", title: "There is no token to send (401).", text: "A server writes its key file when it starts. " + AGAIN, shows: true },
  WrongCertificate: { kind: "wait", title: "The server's certificate is not trusted.", text: "Start the page with the right --ca-file. " + AGAIN, shows: true },
  NotThisService: { kind: "wait", title: "Something else answers in the model's place.", text: AGAIN, shows: true },
  Failed: { kind: "wait", title: "The model's server failed on this image.", text: AGAIN, shows: true },
  BlankImage: { kind: "you", title: "There is nothing to read yet.", text: "Draw something, or put in a photograph." },
  TooLarge: { kind: "you", title: "That image is too large.", text: "Take a smaller one.", shows: true },
  UnreadableFile: { kind: "you", title: "This browser cannot show that file.", text: "PNG, JPEG, WebP, GIF and BMP work." },
  NoImageThere: { kind: "you", title: "There is no image in that.", text: "Copy or drop an image file." },
  UnreadableLink: { kind: "you", title: "This link holds no drawing that can be read.", text: "It may have been cut off. Draw something instead." },
  InvalidOption: { kind: "you", title: "The server does not take this setting.", text: "", shows: true },
  OtherOrigin: { kind: "broken", title: "The page's own server does not know this page.", text: "Open it under the address that make demo printed." },
};

/** An error reply -> the state that it stands for. */
export function stateOf(status, error) {
  const type = error?.type ?? "";
  if (STATES[type]) return type;
  if (type === "UnknownOption") return "InvalidOption";
  if (status === 413) return "TooLarge";
  if (status === 404) return "NotLoaded";
  if (status === 401) return "TokenRefused";
  if (status === 403 || status === 421) return "OtherOrigin";
  if (status === 503 || status === 429 || status === 408) return "Overloaded";
  if (status === 504) return "NoAnswer";
  if ((status === 500 || status === 507) && /worker died/i.test(error?.message ?? "")) return "Died";
  if (status >= 500) return "Failed";
  return "Refused";
}

/** A state -> { kind, title, text } for people. `message` is the server's own. */
export function wordsFor(state, message = "") {
  if (state === "Refused") return { kind: "you", title: "The server does not take this image.", text: message };
  const { kind, title, text, shows } = STATES[state];
  return { kind, title, text: shows && message ? `${sentence(message)} ${text}` : text };
}

function sentence(message) {
  const text = message.trim();
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

export const percent = (share) => {
  if (share >= 0.9995 && share < 1) return "> 99.9 %";
  if (share > 0 && share < 0.0005) return "< 0.1 %";
  return `${(100 * share).toFixed(1)} %`;
};

/** A percentage as it is read aloud. */
export const spoken = (text) => text.replace(">", "over").replace("<", "under").replace(" %", " percent");

/** A number with its sign, three significant digits. */
export const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + short(Math.abs(value));

export const short = (value) => {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1000 || size < 0.001 ? size.toExponential(1) : size.toPrecision(3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  return (value < 0 ? "−" : "") + text;
};

/** A name of the API, for people; a name with capitals is one that they know, such as RdBu_r. */
export const plain = (name) => (/[A-Z]/.test(name) ? name : name.replaceAll("_", " "));

export const capitalised = (text) => text.charAt(0).toUpperCase() + text.slice(1);
