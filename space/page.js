// What Gradio leaves to the page: export of a chat as a file, and names for controls that have none.

function namesakeSave(messages, kind) {
  const text = (content) =>
    typeof content === "string" ? content : content.map((part) => (typeof part === "string" ? part : part.text || ""))[0];
  const chat = messages.map((message) => ({
    role: message.role,
    content: (text(message.content) || "").replaceAll("<\u2060", "<"),
  }));
  const names = (navigator.language || "").startsWith("zh") ? { user: "我", assistant: "助手" } : { user: "You", assistant: "Assistant" };
  const file =
    kind === "json"
      ? new Blob([JSON.stringify({ messages: chat }, null, 2)], { type: "application/json" })
      : new Blob([chat.map(({ role, content }) => `## ${names[role]}\n\n${content}\n`).join("\n")], { type: "text/markdown" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = `chat-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}.${kind === "json" ? "json" : "md"}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function namesakeNameControls() {
  const chinese = (navigator.language || "").startsWith("zh");
  const names = {
    ".submit-button": chinese ? "发送" : "Send",
    ".stop-button": chinese ? "停止" : "Stop",
    ".toggle-button": chinese ? "历史对话" : "Chats",
  };
  for (const [selector, name] of Object.entries(names))
    for (const control of document.querySelectorAll(`${selector}:not([aria-label="${name}"])`)) control.setAttribute("aria-label", name);
  document.documentElement.lang = chinese ? "zh-CN" : "en";
}

document.addEventListener("DOMContentLoaded", () => {
  namesakeNameControls();
  new MutationObserver(namesakeNameControls).observe(document.body, { childList: true, subtree: true });
});
