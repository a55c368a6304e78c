// Questions to the model: the newest one wins.
//
// While a stroke goes on, one question is on its way at a time, and the newest drawing follows it. What a person has finished (a
// stroke, a choice) supersedes the question that is on its way. Nothing is ever queued. What can get better by itself is asked
// again, ever more slowly.

import { stateOf } from "./words.js";

const FIRST_RETRY_MS = 400;
const SLOWEST_RETRY_MS = 4000;
const SLOW_MS = 1500; // from here on the page says that it is waiting
const TIMEOUT_MS = 40_000; // the page's own server gives up before
const PASSING = new Set(["PageGone", "Starting", "Unreachable", "NoAnswer", "Overloaded", "Died", "NotLoaded", "TokenRefused", "NoToken",
  "WrongCertificate", "NotThisService", "Failed"]);

export class Refusal extends Error {
  constructor(state, message, status) {
    super(message);
    Object.assign(this, { state, status });
  }
}

/** Fetch JSON from the page's own server; throws a Refusal that says what is wrong. */
export async function fetchJson(path, options = {}) {
  let reply, text;
  try {
    reply = await fetch(path, { cache: "no-store", redirect: "error", ...options });
    text = await reply.text();
  } catch (error) {
    if (options.signal?.aborted && options.signal.reason?.name !== "TimeoutError") throw error;
    if (options.signal?.aborted) throw new Refusal("NoAnswer", "", 504);
    throw new Refusal("PageGone", "", 0);
  }
  let content = null;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Refusal(reply.ok ? "NotThisService" : stateOf(reply.status, null), "", reply.status);
  }
  if (reply.ok) return { content, text };
  const error = typeof content?.error === "object" && content.error ? content.error : { type: content?.type, message: content?.message };
  throw new Refusal(stateOf(reply.status, error), error.message ?? "", reply.status);
}

export class Asker {
  /**
   * @param question makes the newest request: { body, ... }, or null where there is nothing to ask.
   * @param told { answer(content, question, text), refused(refusal), slow(isSlow), busy() }
   */
  constructor(question, told) {
    Object.assign(this, { question, told, flight: null, isDirty: false, retryTimer: 0, retryMs: 0 });
  }

  /** Whether an answer is waited for. */
  get isBusy() {
    return this.flight !== null || this.retryTimer !== 0 || this.isDirty;
  }

  /** The drawing goes on: ask once what is on its way has been answered. */
  live(startedAt = performance.now()) {
    if (this.retryTimer || this.flight) {
      this.isDirty = true;
      this.startedAt ??= startedAt;
    } else this.#send(startedAt);
  }

  /** Something is finished: ask now, whatever is on its way. */
  settle(startedAt = performance.now()) {
    if (this.retryTimer) return; // the next try asks what is newest then
    this.stop();
    this.#send(startedAt);
  }

  /** Forget what is on its way. */
  stop() {
    clearTimeout(this.retryTimer);
    this.retryTimer = 0;
    this.flight?.abort();
    this.flight = null;
    this.isDirty = false;
    this.startedAt = undefined;
    this.told.busy();
  }

  async #send(startedAt) {
    const question = this.question();
    if (question === null) return;
    question.startedAt = startedAt;
    const flight = new AbortController();
    this.flight = flight;
    this.told.busy();
    const slow = setTimeout(() => this.told.slow(true), SLOW_MS);
    const signal = AbortSignal.any([flight.signal, AbortSignal.timeout(TIMEOUT_MS)]);
    try {
      const { content, text } = await fetchJson("explanation", {
        method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question.body), signal,
      });
      if (this.flight !== flight) return; // superseded
      this.retryMs = 0;
      this.#land();
      this.told.answer(content, question, text);
    } catch (error) {
      if (this.flight !== flight) return;
      if (!(error instanceof Refusal)) {
        this.#land();
        throw error;
      }
      if (PASSING.has(error.state)) this.#askAgainLater();
      else {
        this.retryMs = 0;
        this.#land();
      }
      this.told.refused(error, question);
    } finally {
      clearTimeout(slow);
      if (!this.flight || this.flight === flight) this.told.slow(false);
      this.told.busy();
    }
  }

  #land() {
    this.flight = null;
    if (!this.isDirty) return;
    const startedAt = this.startedAt;
    this.isDirty = false;
    this.startedAt = undefined;
    queueMicrotask(() => this.flight ?? this.#send(startedAt));
  }

  #askAgainLater() {
    this.flight = null;
    this.isDirty = false;
    this.retryMs = Math.min(this.retryMs ? 1.6 * this.retryMs : FIRST_RETRY_MS, SLOWEST_RETRY_MS);
    this.retryTimer = setTimeout(() => {
      this.retryTimer = 0;
      this.#send(performance.now());
    }, this.retryMs);
  }
}
