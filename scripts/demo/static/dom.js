// What every part of the page needs of the document.

export const byId = (id) => document.getElementById(id);

/** Make an element: properties by name, children as elements or text. Text never becomes markup. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Set text, and leave the document alone where it is the same: a live region would say it again. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Call `work` once nothing has called for `delay` ms. */
export function debounced(work, delay) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...values), delay);
  };
}

/** Let a person keep a blob as a file. */
export function saveFile(name, blob) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
