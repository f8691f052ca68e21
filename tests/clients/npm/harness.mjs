// Runs the checks of one client and prints one JSON line each; see ../python/harness.py.
import { readFileSync } from "node:fs";

const env = process.env;

export const QUESTION = "Which digit is this?";

export const target = {
  url: env.CLIENT_URL,
  key: env.CLIENT_KEY,
  model: env.CLIENT_MODEL,
  answer: env.CLIENT_ANSWER,
  image: readFileSync(env.CLIENT_IMAGE),
  rows: env.CLIENT_ROWS,
  tooLong: [{ role: "user", content: "one two three four five six seven eight ".repeat(2000) }],
};

target.imageUrl = `data:image/png;base64,${target.image.toString("base64")}`;
target.question = [
  {
    role: "user",
    content: [
      { type: "image_url", image_url: { url: target.imageUrl } },
      { type: "text", text: QUESTION },
    ],
  },
];

export function expect(found, wanted, what) {
  if (found !== wanted) {
    throw new Error(`${what}: ${JSON.stringify(found)}, not ${JSON.stringify(wanted)}`);
  }
}

export async function fails(promise, test, what) {
  try {
    await promise;
  } catch (error) {
    if (!test(error)) throw error;
    return;
  }
  throw new Error(`${what}: no error`);
}

export async function waitFor(read, wanted, seconds = 300) {
  const deadline = Date.now() + seconds * 1000;
  for (;;) {
    const status = await read();
    if (status === wanted) return;
    if (["failed", "cancelled", "error"].includes(status) || Date.now() > deadline) {
      throw new Error(`the status is ${status}, not ${wanted}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
}

export async function run(checks) {
  const chosen = process.argv.slice(2);
  for (const [name, check] of Object.entries(checks)) {
    if (chosen.length && !chosen.includes(name)) continue;
    let result = { check: name, passed: true, remark: "" };
    try {
      await check();
    } catch (error) {
      console.error(error);
      result = { check: name, passed: false, remark: `${error.name}: ${error.message}` };
    }
    console.log(JSON.stringify(result));
  }
}
