// Controls for what a model takes, built from its own description: a new method, parameter or option appears by itself.

import { element } from "./dom.js";
import { capitalised, plain } from "./words.js";

// What the page itself chooses, or what has no meaning on it.
const CHOSEN_HERE = new Set(["explain", "target", "encoding", "pixels", "size", "layout", "background"]);
// What the page draws by itself, from the numbers.
const OFTEN_USED = new Set(["polarity", "colormap"]);
export const DRAWN_HERE = ["polarity", "colormap", "clip_percentile"];

export class Options {
  /** Controls are added to `main`, and those that few need to `more`. @param changed is called with true where the model has to be asked again. */
  constructor(main, more, changed) {
    Object.assign(this, { main, more, changed, values: {}, controls: new Map(), description: null });
  }

  /** Build all controls anew. Values that were chosen before and still fit stay. */
  describe(description) {
    const former = this.values;
    for (const { field } of this.controls.values()) field.remove();
    this.controls.clear();
    this.description = description;
    this.values = {};
    const parameters = new Set(Object.values(description.methods).flatMap((method) => Object.keys(method.parameters)));
    const names = Object.keys(description.options).filter((name) => !CHOSEN_HERE.has(name));
    const order = ["method", ...names.filter((name) => parameters.has(name)), ...names.filter((name) => name !== "method" && !parameters.has(name))];
    for (const name of order.filter((one) => description.options[one])) {
      const { schema, description: text } = description.options[name];
      this.values[name] = schema.default;
      const control = this.#control(name, schema);
      if (!control) continue;
      const note = element("span", { className: "note", id: `note-${name}` }, name === "method" ? "" : text.replaceAll("`", ""));
      control.setAttribute("aria-describedby", note.id);
      const field = element("div", { className: "field" }, element("label", { htmlFor: control.id }, capitalised(plain(name))), control, note);
      const isOften = name === "method" || parameters.has(name) || OFTEN_USED.has(name);
      if (OFTEN_USED.has(name)) note.className = "hidden";
      (isOften ? this.main : this.more).append(field);
      this.controls.set(name, { control, field, note, schema });
    }
    for (const [name, value] of Object.entries(former)) this.set(name, value);
    this.#fit();
  }

  #control(name, schema) {
    let control;
    if (schema.enum || schema.type === "boolean") {
      const choices = schema.enum ?? [false, true];
      control = element("select", {}, ...choices.map((choice) => element("option", { value: String(choice) }, plain(String(choice)))));
      control.value = String(schema.default);
    } else if (schema.type === "integer" || schema.type === "number") {
      control = element("input", { type: "number", min: schema.minimum, max: schema.maximum, step: schema.type === "integer" ? 1 : "any" });
      control.required = true;
      control.value = schema.default;
    } else return null;
    control.id = `option-${name}`;
    control.addEventListener(control.tagName === "SELECT" ? "change" : "input", () => this.#read(name));
    return control;
  }

  #read(name) {
    const { control, schema } = this.controls.get(name);
    if (!control.checkValidity()) {
      control.reportValidity();
      return;
    }
    this.values[name] = schema.enum ? control.value : schema.type === "boolean" ? control.value === "true" : control.valueAsNumber;
    this.#fit(name);
    this.changed(!DRAWN_HERE.includes(name));
  }

  /** Show the parameters of the chosen method alone, and keep what does not go together apart. */
  #fit(changed = "") {
    const method = this.description.methods[this.values.method];
    const all = new Set(Object.values(this.description.methods).flatMap((one) => Object.keys(one.parameters)));
    for (const [name, { field, note }] of this.controls) {
      field.hidden = all.has(name) && !(name in (method?.parameters ?? {}));
      if (name === "method") note.textContent = method?.description ?? "";
    }
    // Signed numbers need colours that diverge.
    const maps = this.description.colormaps ?? {};
    if (this.values.polarity === "signed" && maps[this.values.colormap]?.diverging === false) {
      if (changed === "polarity") this.set("colormap", Object.keys(maps).find((name) => maps[name].diverging));
      else this.set("polarity", "absolute");
    }
  }

  /** Choose a value where the model takes it; returns whether it does. */
  set(name, value) {
    const found = this.controls.get(name);
    if (!found) return false;
    const { control, schema } = found;
    const former = control.value;
    control.value = String(value);
    if (control.value === "" || !control.checkValidity() || (schema.enum && !schema.enum.includes(String(value)))) {
      control.value = former;
      return false;
    }
    this.values[name] = schema.enum ? control.value : schema.type === "boolean" ? control.value === "true" : control.valueAsNumber;
    if (name === "method") this.#fit();
    return true;
  }

  /** What the request has to say: what is not the default, of the chosen method. */
  request() {
    const asked = {};
    for (const [name, { schema, field }] of this.controls) {
      if (DRAWN_HERE.includes(name) || field.hidden) continue;
      if (this.values[name] !== schema.default) asked[name] = this.values[name];
    }
    return asked;
  }
}
